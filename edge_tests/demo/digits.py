"""A small classifier that is really trained, in two versions and two formats.

`build` takes scikit-learn's bundled digits (1,797 images of 8 x 8), keeps a fifth aside that no training
sees, trains version 1 on part of the rest, fine-tunes version 2 from it on all of the rest, and writes
each version as an int8 ONNX and an int8 TensorFlow Lite file with a golden file beside it. Golden outputs
are computed by the runtime of the format. Seeds are fixed.

By hand: `python -m edge_tests.demo.digits DIRECTORY`.
"""

from __future__ import annotations

import argparse
import copy
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import train_test_split
from sklearn.neural_network import MLPClassifier
from threadpoolctl import threadpool_limits

from edge_tests.demo import onnx_export, tflite_export
from edge_tests.demo.network import INPUT, OUTPUT, Array, Layer, Network, accuracy
from edge_tests.harness.models import golden
from runtimes import registry

ONNX, TFLITE = "onnx-int8", "tflite-int8"
VERSIONS = (1, 2)

_FILES = {ONNX: "digits.onnx", TFLITE: "digits.tflite"}
_EXPORTERS = {ONNX: onnx_export.export, TFLITE: tflite_export.export}

_SEED = 7
_HIDDEN = (320, 160)
_HELD_OUT_SHARE = 0.2
_FIRST_SHARE = 0.15  # of the training data that version 1 sees
_FIRST_PASSES, _FIRST_RATE = 40, 1e-3
_TUNING_PASSES, _TUNING_RATE = 10, 2e-5  # gentle, as fine-tuning is: most weights hardly move
_GOLDEN_SAMPLES = 16
_BRIGHTEST = 16.0  # a pixel of the data set is 0 to 16


@dataclass(frozen=True)
class Data:
    """Images are float32 [n, 64], 0 to 1; labels int64 [n]."""

    train_images: Array
    train_labels: Array
    held_out_images: Array
    held_out_labels: Array


@dataclass(frozen=True)
class DemoModels:
    """What `build` wrote.

    Attributes:
        directory: the files lie in `directory/v<version>/`.
        images: held-out images, float32 [n, 64], in no version's training data.
        labels: of those, int64 [n].
        float_accuracy: of each version on the held-out images before quantisation.
    """

    directory: Path
    images: Array
    labels: Array
    float_accuracy: dict[int, float]
    versions: tuple[int, ...] = VERSIONS
    variant_names: tuple[str, ...] = (ONNX, TFLITE)
    input_name: str = INPUT
    output_name: str = OUTPUT

    def model_path(self, version: int, variant: str) -> Path:
        return self.directory / f"v{version}" / _FILES[variant]

    def golden_path(self, version: int, variant: str) -> Path:
        """An .npz with "input.image" [16, 64] and "output.probabilities" [16, 10]."""
        path = self.model_path(version, variant)
        return path.with_name(f"{path.name}.golden.npz")

    def accuracy(self, version: int, variant: str) -> float:
        """On the held-out images, by the format's own runtime."""
        with registry.load(self.model_path(version, variant)) as model:
            return accuracy(model.run({INPUT: self.images})[OUTPUT], self.labels)


def build(directory: Path) -> DemoModels:
    """Trains both versions and writes all files below `directory`, which is made if it is missing."""
    data = load_data()
    networks = dict(zip(VERSIONS, train(data), strict=True))
    models = DemoModels(
        directory=directory,
        images=data.held_out_images,
        labels=data.held_out_labels,
        float_accuracy={
            version: accuracy(network.predict(data.held_out_images), data.held_out_labels)
            for version, network in networks.items()
        },
    )
    samples = {INPUT: data.held_out_images[:_GOLDEN_SAMPLES]}
    for version, network in networks.items():
        for variant, export in _EXPORTERS.items():
            path = models.model_path(version, variant)
            path.parent.mkdir(parents=True, exist_ok=True)
            export(network, data.train_images, path)
            golden(models.golden_path(version, variant), path, samples)
    return models


def load_data() -> Data:
    """The digits, split with the same seed every time, each class in its share."""
    digits = load_digits()
    images = (digits.data / _BRIGHTEST).astype(np.float32)
    train_images, held_out_images, train_labels, held_out_labels = train_test_split(
        images, digits.target, test_size=_HELD_OUT_SHARE, random_state=_SEED, stratify=digits.target
    )
    return Data(train_images, train_labels, held_out_images, held_out_labels)


def train(data: Data) -> tuple[Network, Network]:
    """Version 1 on the first share of the training data, and version 2 fine-tuned from it on all of it."""
    first_images, _, first_labels, _ = train_test_split(
        data.train_images,
        data.train_labels,
        train_size=_FIRST_SHARE,
        random_state=_SEED,
        stratify=data.train_labels,
    )
    first = MLPClassifier(
        _HIDDEN,
        learning_rate_init=_FIRST_RATE,
        max_iter=_FIRST_PASSES,
        batch_size=32,
        random_state=_SEED,
        warm_start=True,
    )
    # Matrices this small only lose by more threads, most of all where other processes want the cores.
    with warnings.catch_warnings(), threadpool_limits(limits=1):
        # The number of passes is ours to choose: stopping before convergence is no defect here.
        warnings.simplefilter("ignore", ConvergenceWarning)
        first.fit(first_images, first_labels)
        tuned = copy.deepcopy(first).set_params(learning_rate_init=_TUNING_RATE, max_iter=_TUNING_PASSES)
        tuned.fit(data.train_images, data.train_labels)
    return _network(first), _network(tuned)


def _network(classifier: MLPClassifier) -> Network:
    return Network(
        tuple(
            Layer(weights.astype(np.float32), bias.astype(np.float32))
            for weights, bias in zip(classifier.coefs_, classifier.intercepts_, strict=True)
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("directory", type=Path, metavar="DIRECTORY")
    models = build(parser.parse_args().directory)
    print(f"{len(models.labels)} held-out images")
    for version in models.versions:
        print(f"v{version} float32      accuracy {models.float_accuracy[version]:.4f}")
        for variant in models.variant_names:
            path = models.model_path(version, variant)
            share = models.accuracy(version, variant)
            print(f"v{version} {variant:12} accuracy {share:.4f}  {path.stat().st_size:7,} bytes  {path}")


if __name__ == "__main__":
    main()
