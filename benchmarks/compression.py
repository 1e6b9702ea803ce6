"""What each compression recipe is worth: size, agreement and speed, side by side.

    python -m benchmarks.compression

Trains three nets on scikit-learn's digits (a minute), applies every recipe of ONNX and OpenVINO to
them, and prints Markdown. Speed is that of the whole session on one thread, fp32 and compressed
in turns, as the median of the ratios; the digits nets are too small for it to mean much, so it is
also measured on `benchmarks.nets`' MLP (hidden 1024) and CNN (160 × 160), whose weights are random.
"""

import sys
import tempfile
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.nets import build_cnn, build_mlp
from converters.compression.calibration import CalibrationSet, adapt
from converters.compression.recipes import get_recipe, load_tool
from converters.compression.toolchain import measure_size, open_session, read_inputs
from converters.errors import ConversionError
from converters.task import ModelFile, ModelFormat, Task
from platforms.parity import compare_output
from platforms.runtimes.base import Array
from tests.harness.digit_nets import (
    ConvNet,
    Encoder,
    Perceptron,
    build,
    export_onnx,
    load_split,
    train,
)

_KINDS: tuple[tuple[str, type[Any]], ...] = (
    ("mlp", Perceptron),
    ("cnn", ConvNet),
    ("encoder", Encoder),
)
_ONNX = ("onnx_static", "onnx_dynamic", "onnx_fp16", "onnx_weights8", "onnx_weights4")
_VINO = ("openvino_int8", "openvino_weights8", "openvino_weights4", "openvino_fp16")
_COUNTS = (8, 32, 64, 128, 256, 512)
_SAMPLES = 128
_ROUNDS = 15
_MIN_ROUND_S = 0.02


def main() -> int:
    """Measure and print; return the exit status."""
    warnings.simplefilter("ignore")
    known, unseen = load_split()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        digits = {
            kind: export_onnx(train(build(net), known), folder / f"{kind}.onnx")
            for kind, net in _KINDS
        }
        _print("| net | recipe | agreement | SQNR, dB | size |\n| --- | --- | --- | --- | --- |")
        for kind, path in digits.items():
            for row in measure_answers(path, known.x, unseen.x, folder / kind):
                _print(f"| {kind} | {row} |")
        _print("\n| samples | SQNR of the CNN, dB |\n| --- | --- |")
        for count in _COUNTS:
            level = measure_samples(digits["cnn"], known.x, unseen.x, count, folder / f"{count}")
            _print(f"| {count} | {level:.1f} |")
        _print("\n| net | recipe | size | speed, batch 1 | speed, batch 8 |\n" + "| --- " * 5 + "|")
        for kind, path, shape in (
            ("MLP", build_mlp(folder / "big_mlp.onnx", hidden=1024), (64,)),
            ("CNN", build_cnn(folder / "big_cnn.onnx"), (3, 160, 160)),
            ("encoder (digits)", digits["encoder"], (1, 8, 8)),
        ):
            for row in measure_speed(path, shape, folder / f"speed_{kind[:3]}"):
                _print(f"| {kind} | {row} |")
    return 0


def _print(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def _apply(
    name: str, source: Path, calibration: Path, folder: Path
) -> tuple[Path, Mapping[str, Any]]:
    recipe = get_recipe(name)
    scratch = folder / f"{name}.scratch"
    scratch.mkdir(parents=True)
    options = dict(recipe.options)
    if recipe.needs_calibration:
        options["calibration"] = str(calibration)
    target = folder / f"{name}{'.xml' if recipe.target is ModelFormat.OPENVINO else '.onnx'}"
    return target, load_tool(recipe)(
        Task(ModelFile(source, recipe.source), target, scratch, options)
    )


def _save_calibration(source: Path, x: Array, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    specs = read_inputs(source, "ort")
    return adapt(CalibrationSet({specs[0].name: x}, {"source": "benchmark"}), specs).save(path)


def _to_openvino(source: Path, folder: Path) -> Path:
    import openvino

    path = folder / "source.xml"
    openvino.save_model(openvino.Core().read_model(source), path, compress_to_fp16=False)
    return path


def _run(path: Path, runtime: str, x: Array) -> Array:
    session = open_session(path, runtime)
    try:
        return session.run({session.inputs[0].name: x})[session.outputs[0].name]
    finally:
        session.close()


def measure_answers(source: Path, known: Array, unseen: Array, folder: Path) -> list[str]:
    """Return a row for each recipe: agreement and SQNR on pictures that it has not seen."""
    calibration = _save_calibration(source, known[:_SAMPLES], folder / "calibration.npz")
    reference = _run(source, "ort", unseen)
    vino = _to_openvino(source, folder)
    rows = []
    for name in (*_ONNX, *_VINO):
        is_vino = name in _VINO
        target, facts = _apply(name, vino if is_vino else source, calibration, folder)
        if facts["is_no_op"]:
            rows.append(f"`{name}` | no-op | – | –")
            continue
        found = _run(target, "openvino" if is_vino else "ort", unseen)
        parity = compare_output("y", reference, found)
        size = measure_size(target) / measure_size(source)
        rows.append(f"`{name}` | {parity.top_1:.3f} | {parity.sqnr_db:.1f} | {size:.2f}")
    return rows


def measure_samples(source: Path, known: Array, unseen: Array, count: int, folder: Path) -> float:
    """Return the SQNR in dB of static INT8, calibrated with so many samples."""
    calibration = _save_calibration(source, known[:count], folder / "calibration.npz")
    target, _ = _apply("onnx_static", source, calibration, folder)
    reference = _run(source, "ort", unseen)
    return compare_output("y", reference, _run(target, "ort", unseen)).sqnr_db or 0.0


def measure_speed(source: Path, shape: tuple[int, ...], folder: Path) -> list[str]:
    """Return a row for each recipe of ONNX: size, and speed beside fp32, batch 1 and 8."""
    x = np.random.default_rng(1).standard_normal((16, *shape)).astype(np.float32)
    calibration = _save_calibration(source, x, folder / "calibration.npz")
    rows = []
    for name in _ONNX:
        try:
            target, facts = _apply(name, source, calibration, folder)
        except ConversionError as exc:
            rows.append(f"`{name}` | {exc} | – | –")
            continue
        if facts["is_no_op"]:
            rows.append(f"`{name}` | no-op | – | –")
            continue
        speeds = [_compare_speed(source, target, x[:batch]) for batch in (1, 8)]
        rows.append(f"`{name}` | {facts['size_ratio']:.2f} | {speeds[0]:.2f}× | {speeds[1]:.2f}×")
    return rows


def _compare_speed(before: Path, after: Path, x: Array) -> float:
    """Return how many times as fast the second is, as the median over turns."""
    sessions = [open_session(path, "ort") for path in (before, after)]
    feed = {sessions[0].inputs[0].name: x}
    runs = 1
    while _time(sessions[0], feed, runs) < _MIN_ROUND_S:
        runs *= 2
    ratios = []
    for _ in range(_ROUNDS):
        slow, fast = (_time(session, feed, runs) for session in sessions)
        ratios.append(slow / fast)
    for session in sessions:
        session.close()
    return float(np.median(ratios))


def _time(session: Any, feed: dict[str, Array], runs: int) -> float:
    start = time.perf_counter()
    for _ in range(runs):
        session.run(feed)
    return time.perf_counter() - start


if __name__ == "__main__":
    sys.exit(main())
