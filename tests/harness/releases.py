"""Versions of a small real model, good and bad: the digits net with a golden set."""

import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper

from agent.manifest import (
    ArtifactEntry,
    Golden,
    Manifest,
    Tolerance,
    compute_sha256,
    read_manifest,
    write_manifest,
)
from platforms.artifact import ArtifactFormat, Precision
from platforms.runtimes.base import Array, LoadOptions
from platforms.runtimes.registry import get_runtime

DIGITS = Path(__file__).parents[2] / "console" / "models" / "digits"
ROWS = 64


def make_pixels(rows: int = ROWS) -> Array:
    """Return pictures of digits, float32[rows, 64], 0–1."""
    from sklearn.datasets import load_digits

    found = load_digits()
    pixels: Array = (found.data[:rows] / 16).astype(np.float32)
    return pixels


def write_digits(
    folder: Path,
    version: str = "1.0.0",
    *,
    files: Mapping[str, Path] | None = None,
    golden: bool = True,
    name: str = "digits",
    tolerance: Tolerance | None = None,
) -> Path:
    """Write a version folder of the digits net.

    Args:
        folder: of the version.
        version: its release.
        files: artifact file names with what is in them, all ONNX; None: the fp32 net.
        golden: whether it brings a golden set, of the fp32 net's answers.
        name: of the model.
        tolerance: of the golden set.
    """
    folder.mkdir(parents=True, exist_ok=True)
    found = read_manifest(DIGITS)
    shutil.copy(DIGITS / "labels.txt", folder)
    entries = []
    for file, source in (files or {"digits.onnx": DIGITS / "digits.onnx"}).items():
        shutil.copy(source, folder / file)
        entries.append(
            ArtifactEntry(
                file=file,
                format=ArtifactFormat.ONNX,
                precision=Precision.INT8 if "int8" in file else Precision.FP32,
                sha256=compute_sha256(folder / file),
                size_bytes=(folder / file).stat().st_size,
            )
        )
    extra: dict[str, str] = {}
    proof: Golden | None = None
    if golden:
        pixels = make_pixels()
        session = get_runtime("ort").load(DIGITS / "digits.onnx", LoadOptions(threads=1))
        np.savez(folder / "golden_inputs.npz", pixels=pixels)
        np.savez(folder / "golden_outputs.npz", scores=session.run({"pixels": pixels})["scores"])
        for file in ("golden_inputs.npz", "golden_outputs.npz"):
            extra[file] = compute_sha256(folder / file)
        proof = Golden(
            inputs="golden_inputs.npz",
            outputs="golden_outputs.npz",
            tolerance=tolerance or Tolerance(),
        )
    manifest = Manifest.model_validate(
        {
            **found.model_dump(mode="json", by_alias=True),
            "name": name,
            "version": version,
            "artifacts": [entry.model_dump(mode="json") for entry in entries],
            "files": {"labels.txt": found.files["labels.txt"], **extra},
            "golden": proof and proof.model_dump(mode="json"),
        }
    )
    write_manifest(manifest, folder)
    return folder


def write_garbage(path: Path) -> Path:
    """Write the digits net with its last weights shuffled: it loads, runs, and is wrong."""
    model = onnx.load(DIGITS / "digits.onnx")
    rng = np.random.default_rng(3)
    for tensor in model.graph.initializer:
        array = numpy_helper.to_array(tensor)
        if array.dtype == np.float32:
            mixed = rng.permutation(array.reshape(-1)).reshape(array.shape)
            tensor.CopyFrom(numpy_helper.from_array(mixed, tensor.name))
    onnx.save(model, path)
    return path


def write_slow(path: Path, layers: int = 200, width: int = 512) -> Path:
    """Write the digits net with work before it that changes nothing and takes its time."""
    model = onnx.load(DIGITS / "digits.onnx")
    graph = model.graph
    pixels = graph.input[0].name
    eye = numpy_helper.from_array(np.eye(64, dtype=np.float32), "slow_eye")
    wide = numpy_helper.from_array(np.eye(64, width, dtype=np.float32), "slow_wide")
    square = numpy_helper.from_array(np.eye(width, dtype=np.float32), "slow_square")
    back = numpy_helper.from_array(np.eye(width, 64, dtype=np.float32), "slow_back")
    graph.initializer.extend([eye, wide, square, back])
    nodes = [onnx.helper.make_node("MatMul", [pixels, "slow_wide"], ["slow_0"])]
    nodes += [
        onnx.helper.make_node("MatMul", [f"slow_{n}", "slow_square"], [f"slow_{n + 1}"])
        for n in range(layers)
    ]
    nodes.append(onnx.helper.make_node("MatMul", [f"slow_{layers}", "slow_back"], ["slow_pixels"]))
    for node in graph.node:
        for place, given in enumerate(node.input):
            if given == pixels:
                node.input[place] = "slow_pixels"
    for node in reversed(nodes):
        graph.node.insert(0, node)
    onnx.save(model, path)
    return path
