"""A model so small that only the pipeline around it is measured: 64 → 10, one MatMul."""

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from agent.manifest import (
    ArtifactEntry,
    Manifest,
    TensorEntry,
    compute_sha256,
    write_manifest,
)
from platforms.artifact import ArtifactFormat, Datatype, Precision


def write_version(
    folder: Path, name: str, graph: onnx.GraphProto, tensors: tuple[TensorEntry, TensorEntry]
) -> Path:
    """Write a version folder of a model with one input and one output; return the ONNX file."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "model.onnx"
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.save(model, path)
    artifact = ArtifactEntry(
        file=path.name,
        format=ArtifactFormat.ONNX,
        precision=Precision.FP32,
        sha256=compute_sha256(path),
        size_bytes=path.stat().st_size,
    )
    manifest = Manifest(
        schema="edgeward.manifest/v1",
        name=name,
        version="1.0.0",
        inputs=tensors[:1],
        outputs=tensors[1:],
        artifacts=(artifact,),
    )
    write_manifest(manifest, folder)
    return path


def write_tiny_model(folder: Path, name: str = "tiny") -> Path:
    """Write a version folder of the model; return the ONNX file's path."""
    weights = np.random.default_rng(7).standard_normal((64, 10)).astype(np.float32)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        name,
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 64])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 10])],
        [numpy_helper.from_array(weights, "w")],
    )
    tensors = (
        TensorEntry(name="x", datatype=Datatype.FP32, shape=(-1, 64)),
        TensorEntry(name="y", datatype=Datatype.FP32, shape=(-1, 10)),
    )
    return write_version(folder, name, graph, tensors)
