"""The measured choice beside a static ranking: one net in every format, on this machine.

`python -m benchmarks.selection [--json] [--width 1024] [--seconds 0.5]`

The same net as ONNX fp32 and INT8, LiteRT, TorchScript, `.pt2` and OpenVINO goes through staging as
it does on a box. A static table takes OpenVINO before ONNX before TFLite before Torch, and INT8
before fp32: its choice is held against the measured one. Both figures come from one run.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import openvino
import torch
from ai_edge_litert import schema_py_generated as schema
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import QuantType, quantize_dynamic

from agent.choice import ChoiceRecord, Trial, Verdict
from agent.manifest import (
    ArtifactEntry,
    Golden,
    Manifest,
    TensorEntry,
    Tolerance,
    compute_sha256,
    write_manifest,
)
from agent.platformfile import detect_and_save
from benchmarks.make_proof_formats import TfliteFile
from platforms.artifact import ArtifactFormat, Datatype, Precision
from platforms.runtimes.base import LoadOptions
from platforms.runtimes.registry import get_runtime
from worker.staging.stage import Stager, StageRequest
from worker.staging.trial import TrialLimits

INPUTS, CLASSES, ROWS = 256, 10, 64
RANKING = ("openvino", "ort", "litert", "torchscript")
"""Of the static table, best first; INT8 before fp32 within a runtime."""


def make_weights(width: int) -> list[tuple[Any, Any]]:
    """Return (weights float32[in, out], bias float32[out]) of three layers."""
    rng = np.random.default_rng(11)
    sizes = [(INPUTS, width), (width, width), (width, CLASSES)]
    return [
        (
            (rng.standard_normal(size) / np.sqrt(size[0])).astype(np.float32),
            rng.standard_normal(size[1]).astype(np.float32) * 0.1,
        )
        for size in sizes
    ]


def write_onnx(path: Path, layers: list[tuple[Any, Any]]) -> None:
    """Write the net as ONNX."""
    nodes, weights, last = [], [], "x"
    for index, (weight, bias) in enumerate(layers):
        weights += [
            numpy_helper.from_array(weight, f"w{index}"),
            numpy_helper.from_array(bias, f"b{index}"),
        ]
        nodes.append(helper.make_node("MatMul", [last, f"w{index}"], [f"m{index}"]))
        is_last = index == len(layers) - 1
        gives = "y" if is_last else f"a{index}"
        nodes.append(helper.make_node("Add", [f"m{index}", f"b{index}"], [gives]))
        last = gives
        if not is_last:
            nodes.append(helper.make_node("Relu", [gives], [f"h{index}"]))
            last = f"h{index}"
    graph = helper.make_graph(
        nodes,
        "selection",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", INPUTS])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", CLASSES])],
        weights,
    )
    opset = [helper.make_opsetid("", 18)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=10), path)


def write_tflite(path: Path, layers: list[tuple[Any, Any]]) -> None:
    """Write the net as TFLite, op by op."""
    file = TfliteFile()
    x = last = file.add("x", [-1, INPUTS])
    for index, (weight, bias) in enumerate(layers):
        is_last = index == len(layers) - 1
        matrix = file.add(f"w{index}", list(weight.T.shape), content=np.ascontiguousarray(weight.T))
        vector = file.add(f"b{index}", list(bias.shape), content=bias)
        gives = file.add("y" if is_last else f"h{index}", [-1, len(bias)])
        options = schema.FullyConnectedOptionsT()
        if not is_last:
            options.fusedActivationFunction = schema.ActivationFunctionType.RELU
        ops = schema.BuiltinOperator
        file.call(ops.FULLY_CONNECTED, [last, matrix, vector], gives, options)
        last = gives
    path.write_bytes(file.build(x, last))


def build_torch(layers: list[tuple[Any, Any]]) -> torch.nn.Module:
    """Return the net as a torch module."""
    parts: list[torch.nn.Module] = []
    for weight, bias in layers:
        linear = torch.nn.Linear(*weight.shape)
        with torch.no_grad():
            linear.weight.copy_(torch.from_numpy(weight.T.copy()))
            linear.bias.copy_(torch.from_numpy(bias.copy()))
        parts += [linear, torch.nn.ReLU()]
    return torch.nn.Sequential(*parts[:-1]).eval()


def write_version(folder: Path, width: int) -> None:
    """Write a version of the net with an artifact in every format, and a golden set."""
    folder.mkdir(parents=True)
    layers = make_weights(width)
    write_onnx(folder / "net.onnx", layers)
    quantize_dynamic(folder / "net.onnx", folder / "net.int8.onnx", weight_type=QuantType.QInt8)
    write_tflite(folder / "net.tflite", layers)
    module, example = build_torch(layers), torch.zeros(2, INPUTS)
    script: Any = torch.jit
    script.trace(module, example).save(str(folder / "net.torchscript"))
    batch = torch.export.Dim("batch")
    program = torch.export.export(module, (example,), dynamic_shapes=({0: batch},))
    torch.export.save(program, folder / "net.pt2")
    model = openvino.Core().read_model(folder / "net.onnx")
    openvino.save_model(model, folder / "net.xml", compress_to_fp16=False)
    x = np.random.default_rng(5).standard_normal((ROWS, INPUTS)).astype(np.float32)
    session = get_runtime("ort").load(folder / "net.onnx", LoadOptions(threads=1))
    np.savez(folder / "golden_inputs.npz", x=x)
    np.savez(folder / "golden_outputs.npz", y=session.run({"x": x})["y"])
    write_manifest(describe(folder), folder)


def describe(folder: Path) -> Manifest:
    """Return the manifest."""
    formats = {
        "net.onnx": (ArtifactFormat.ONNX, Precision.FP32),
        "net.int8.onnx": (ArtifactFormat.ONNX, Precision.INT8),
        "net.tflite": (ArtifactFormat.TFLITE, Precision.FP32),
        "net.torchscript": (ArtifactFormat.TORCHSCRIPT, Precision.FP32),
        "net.pt2": (ArtifactFormat.TORCH_EXPORT, Precision.FP32),
        "net.xml": (ArtifactFormat.OPENVINO, Precision.FP32),
    }
    others = ("golden_inputs.npz", "golden_outputs.npz", "net.bin")
    return Manifest(
        schema="edgeward.manifest/v1",
        name="selection",
        version="1.0.0",
        inputs=(TensorEntry(name="x", datatype=Datatype.FP32, shape=(-1, INPUTS)),),
        outputs=(TensorEntry(name="y", datatype=Datatype.FP32, shape=(-1, CLASSES)),),
        artifacts=tuple(
            ArtifactEntry(
                file=name,
                format=form,
                precision=precision,
                sha256=compute_sha256(folder / name),
                size_bytes=(folder / name).stat().st_size,
            )
            for name, (form, precision) in formats.items()
        ),
        files={name: compute_sha256(folder / name) for name in others},
        golden=Golden(
            inputs="golden_inputs.npz",
            outputs="golden_outputs.npz",
            tolerance=Tolerance(min_agreement=0.95),
        ),
    )


def choose_statically(record: ChoiceRecord) -> Trial | None:
    """Return what a static table takes: by runtime, then INT8 first; right or wrong."""
    tried = [one for one in record.trials if one.runtime in RANKING and one.points]
    return min(
        tried,
        key=lambda one: (RANKING.index(one.runtime or ""), one.precision != Precision.INT8),
        default=None,
    )


def measure(width: int, seconds: float) -> dict[str, Any]:
    """Stage the net and hold both choices beside each other."""
    with tempfile.TemporaryDirectory(prefix="edgeward-selection-") as name:
        folder = Path(name)
        write_version(folder / "version", width)
        spec = detect_and_save(folder)
        stager = Stager(spec, 1, folder / "choices")
        request = StageRequest(folder / "version", limits=TrialLimits(point_s=seconds))
        record = stager.stage(
            request, lambda done, total, what: print(done, total, what, file=sys.stderr)
        )
    chosen, fixed = record.chosen, choose_statically(record)
    assert chosen is not None
    right = [one for one in record.trials if one.verdict in (Verdict.CHOSEN, Verdict.RIGHT)]
    best = min(one.p95_ms or 1e9 for one in right)
    return {
        "trials": [one.model_dump(mode="json") for one in record.trials],
        "chosen": f"{chosen.file} on {chosen.runtime}",
        "chosen_over_best": round((chosen.p95_ms or 0.0) / best, 3),
        "static": fixed and f"{fixed.file} on {fixed.runtime}",
        "static_is_right": fixed is not None and fixed in right,
        "static_over_chosen": fixed and round((fixed.p95_ms or 0.0) / (chosen.p95_ms or 1.0), 2),
    }


def main() -> int:
    """Measure and print; return the exit status."""
    parser = argparse.ArgumentParser(description="Measured choice beside a static ranking.")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--seconds", type=float, default=0.5, help="per batch size")
    options = parser.parse_args()
    found = measure(options.width, options.seconds)
    if options.json:
        print(json.dumps(found, indent=1))
        return 0
    print(f"{'artifact':<17}{'runtime':<13}{'verdict':<9}{'p95 ms':>8}{'rows/s':>9}{'MB':>6}")
    for one in found["trials"]:
        points = one["points"]
        p95 = f"{points[0]['p95_ms']:.3f}" if points else "–"
        rate = f"{max(point['rows_per_s'] for point in points):.0f}" if points else "–"
        mb = f"{one['rss_mb']:.0f}" if one["rss_mb"] else "–"
        verdict = one["verdict"]
        print(f"{one['file']:<17}{one['runtime'] or '–':<13}{verdict:<9}{p95:>8}{rate:>9}{mb:>6}")
    print(f"measured: {found['chosen']} ({found['chosen_over_best']} × the best p95 that is right)")
    print(f"static:   {found['static']} ({found['static_over_chosen']} × the measured one's p95)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
