"""Training of the demo's first model: which digit a picture shows.

Writes `digits/`: manifest.json, digits.onnx (fp32), digits.int8.onnx, labels.txt. A
small perceptron of scikit-learn, written down as an ONNX graph by hand; INT8 by
onnxruntime as static QDQ with unsigned activations and signed weights per channel.
Seeded: the same packages on the same CPU give the same weights.

    python -m console.models.train_digits            # train, measure, write
    python -m console.models.train_digits --check    # measure the files as they are
"""

import argparse
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agent.manifest import (
    ArtifactEntry,
    Golden,
    Manifest,
    Step,
    TensorEntry,
    compute_sha256,
    read_manifest,
    verify_files,
    write_manifest,
)
from console.models.samples import SIDE, DigitSplit, load_digit_split
from platforms.artifact import ArtifactFormat, Datatype, Precision
from platforms.runtimes.base import LoadOptions
from platforms.runtimes.registry import get_runtime

FOLDER = Path(__file__).parent / "digits"
FP32_FILE, INT8_FILE, LABELS_FILE = "digits.onnx", "digits.int8.onnx", "labels.txt"
GOLDEN_INPUTS, GOLDEN_OUTPUTS = "golden_inputs.npz", "golden_outputs.npz"
_GOLDEN_ROWS = 64

MIN_ACCURACY = 0.97
MIN_AGREEMENT = 0.99
"""Of the INT8 file's first choice with the fp32 file's, on pictures neither was made with."""

_HIDDEN = (96, 48)
_SEED = 3
_CLASSES = 10
_PIXELS = SIDE * SIDE
_CALIBRATION_PICTURES = 300
_FREE = -1

# Read by every onnxruntime since 1.11 and by the converters that other runtimes need.
_OPSET, _IR_VERSION = 13, 8

Float = NDArray[np.float32]


@dataclass(frozen=True)
class Measures:
    """What the two files do on the 450 held-out pictures."""

    accuracy: float
    accuracy_int8: float
    agreement: float

    def describe(self) -> str:
        """Return the sentence that the manifest's description holds."""
        return (
            f"Held-out accuracy {self.accuracy:.4f} (fp32), {self.accuracy_int8:.4f} (int8), "
            f"agreement {self.agreement:.4f}."
        )


def main() -> int:
    """Train and write, or check what is there; return the exit status."""
    parser = argparse.ArgumentParser(description="Train the demo's digits model, or check it.")
    parser.add_argument("--check", action="store_true", help="measure the files as they are")
    parser.add_argument("--folder", type=Path, default=FOLDER)
    options = parser.parse_args()
    split = load_digit_split()
    if not options.check:
        write_version(split, options.folder)
    measures = measure(split, options.folder)
    sys.stdout.write(measures.describe() + "\n")
    is_good = measures.accuracy >= MIN_ACCURACY and measures.agreement >= MIN_AGREEMENT
    is_recorded = measures.describe() in read_manifest(options.folder).description
    return 0 if is_good and is_recorded else 1


def write_version(split: DigitSplit, folder: Path) -> None:
    """Train on the split's training part and write the whole version into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / FP32_FILE).write_bytes(build_model(train(split)))
    quantize(folder / FP32_FILE, folder / INT8_FILE, split)
    labels = "".join(f"{digit}\n" for digit in range(_CLASSES))
    (folder / LABELS_FILE).write_text(labels, encoding="utf-8")
    write_golden(folder, split)
    write_manifest(describe(folder, _measure_files(split, folder)), folder)


def train(split: DigitSplit) -> list[tuple[Float, Float]]:
    """Return (weights `[in, out]`, bias `[out]`) of each layer."""
    from sklearn.neural_network import MLPClassifier

    classifier = MLPClassifier(_HIDDEN, alpha=1e-2, max_iter=400, tol=1e-5, random_state=_SEED)
    classifier.fit(to_tensor(split.train_images), split.train_labels)
    layers = zip(classifier.coefs_, classifier.intercepts_, strict=True)
    return [(w.astype(np.float32), b.astype(np.float32)) for w, b in layers]


def to_tensor(images: NDArray[np.uint8]) -> Float:
    """Return `float32[N, 64]`, 0–1, as the manifest's step `image` makes it."""
    return images.reshape(len(images), _PIXELS).astype(np.float32) / np.float32(255)


def build_model(layers: list[tuple[Float, Float]]) -> bytes:
    """Return the ONNX file: `pixels` float32[N, 64] to `scores` float32[N, 10], no softmax."""
    from onnx import TensorProto, helper, numpy_helper

    nodes, constants, current = [], [], "pixels"
    for number, (weights, bias) in enumerate(layers):
        names = [f"weights{number}", f"bias{number}"]
        constants += [numpy_helper.from_array(weights, names[0])]
        constants += [numpy_helper.from_array(bias, names[1])]
        is_last = number == len(layers) - 1
        result = "scores" if is_last else f"sum{number}"
        nodes.append(helper.make_node("Gemm", [current, *names], [result]))
        if not is_last:
            nodes.append(helper.make_node("Relu", [result], [f"active{number}"]))
        current = f"active{number}"
    graph = helper.make_graph(
        nodes,
        "edgeward-digits",
        [helper.make_tensor_value_info("pixels", TensorProto.FLOAT, ["N", _PIXELS])],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["N", _CLASSES])],
        constants,
    )
    opset = [helper.make_opsetid("", _OPSET)]
    model = helper.make_model(graph, opset_imports=opset, ir_version=_IR_VERSION)
    return bytes(model.SerializeToString(deterministic=True))


class _Calibration:
    """Training pictures, one at a time, in the form onnxruntime asks for."""

    def __init__(self, images: Float) -> None:
        self._pictures: Iterator[Float] = iter(images[:_CALIBRATION_PICTURES])

    def get_next(self) -> dict[str, Float] | None:
        """Return the next picture, or None at the end."""
        picture = next(self._pictures, None)
        return None if picture is None else {"pixels": picture[np.newaxis]}


def quantize(source: Path, target: Path, split: DigitSplit) -> None:
    """Write the INT8 form of `source` to `target`: static QDQ, U8S8, per channel."""
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    with tempfile.TemporaryDirectory() as scratch:
        prepared = Path(scratch) / "prepared.onnx"
        # Symbolic shapes would need sympy, and this graph's are plain.
        quant_pre_process(source, prepared, skip_symbolic_shape=True)
        quantization.quantize_static(
            prepared,
            target,
            _Calibration(to_tensor(split.train_images)),
            quant_format=quantization.QuantFormat.QDQ,
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
            per_channel=True,
        )


def measure(split: DigitSplit, folder: Path) -> Measures:
    """Return the measures of the version in `folder`, after checking its digests.

    Raises:
        ManifestError, DigestMismatchError: the folder is not what its manifest says.
    """
    verify_files(read_manifest(folder), folder)
    return _measure_files(split, folder)


def _measure_files(split: DigitSplit, folder: Path) -> Measures:
    chosen = [_classify(folder / file, split) for file in (FP32_FILE, INT8_FILE)]
    accuracy, accuracy_int8 = (float((found == split.held_out_labels).mean()) for found in chosen)
    return Measures(accuracy, accuracy_int8, float((chosen[0] == chosen[1]).mean()))


def _classify(path: Path, split: DigitSplit) -> NDArray[Any]:
    session = get_runtime("ort").load(path, LoadOptions(threads=1))
    scores = session.run({"pixels": to_tensor(split.held_out_images)})["scores"]
    chosen: NDArray[Any] = scores.argmax(axis=1)
    return chosen


def write_golden(folder: Path, split: DigitSplit) -> None:
    """Write held-out pictures and the fp32 net's answers to them: what proves it right on a box."""
    pixels = to_tensor(split.held_out_images)[:_GOLDEN_ROWS]
    session = get_runtime("ort").load(folder / FP32_FILE, LoadOptions(threads=1))
    np.savez(folder / GOLDEN_INPUTS, pixels=pixels)
    np.savez(folder / GOLDEN_OUTPUTS, scores=session.run({"pixels": pixels})["scores"])


def describe(folder: Path, measures: Measures) -> Manifest:
    """Return the manifest of the files in `folder`."""
    image = {"size": [SIDE, SIDE], "mode": "L", "layout": "NC", "resample": "box"}
    precisions = {FP32_FILE: Precision.FP32, INT8_FILE: Precision.INT8}
    return Manifest(
        schema="edgeward.manifest/v1",
        name="digits",
        version="1.0.0",
        description="Which digit a picture shows, white on black; trained on scikit-learn's "
        f"digits by console/models/train_digits.py. {measures.describe()}",
        license="Apache-2.0; data: UCI Optical Recognition of Handwritten Digits, CC BY 4.0",
        inputs=(TensorEntry(name="pixels", datatype=Datatype.FP32, shape=(_FREE, _PIXELS)),),
        outputs=(TensorEntry(name="scores", datatype=Datatype.FP32, shape=(_FREE, _CLASSES)),),
        preprocess=Step(name="image", params=image),
        postprocess=(
            Step(name="softmax"),
            Step(name="top_k", params={"k": 3, "labels_file": LABELS_FILE}),
        ),
        artifacts=tuple(
            _describe_artifact(folder / file, precision) for file, precision in precisions.items()
        ),
        files={
            name: compute_sha256(folder / name)
            for name in (LABELS_FILE, GOLDEN_INPUTS, GOLDEN_OUTPUTS)
        },
        golden=Golden(inputs=GOLDEN_INPUTS, outputs=GOLDEN_OUTPUTS),
    )


def _describe_artifact(path: Path, precision: Precision) -> ArtifactEntry:
    return ArtifactEntry(
        file=path.name,
        format=ArtifactFormat.ONNX,
        precision=precision,
        sha256=compute_sha256(path),
        size_bytes=path.stat().st_size,
    )


if __name__ == "__main__":
    sys.exit(main())
