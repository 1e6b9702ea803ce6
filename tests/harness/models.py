"""Models that misbehave, for real: no stand-ins, ONNX Runtime runs them."""

from pathlib import Path

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from agent.manifest import TensorEntry
from benchmarks.tiny_model import write_version
from platforms.artifact import Datatype


def write_endless_model(folder: Path, name: str = "endless") -> None:
    """Write a model that loops as often as its input says: 2⁶² times is for ever."""
    body = helper.make_graph(
        [
            helper.make_node("Identity", ["go"], ["again"]),
            helper.make_node("Add", ["sum", "one"], ["more"]),
        ],
        "body",
        [
            helper.make_tensor_value_info("i", TensorProto.INT64, []),
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
            helper.make_tensor_value_info("sum", TensorProto.INT64, [1]),
        ],
        [
            helper.make_tensor_value_info("again", TensorProto.BOOL, []),
            helper.make_tensor_value_info("more", TensorProto.INT64, [1]),
        ],
        [numpy_helper.from_array(np.ones(1, np.int64), "one")],
    )
    graph = helper.make_graph(
        [
            helper.make_node("Squeeze", ["x"], ["times"]),
            helper.make_node("Loop", ["times", "true", "zero"], ["y"], body=body),
        ],
        name,
        [helper.make_tensor_value_info("x", TensorProto.INT64, [1])],
        [helper.make_tensor_value_info("y", TensorProto.INT64, [1])],
        [
            numpy_helper.from_array(np.array(True), "true"),
            numpy_helper.from_array(np.zeros(1, np.int64), "zero"),
        ],
    )
    tensors = (
        TensorEntry(name="x", datatype=Datatype.INT64, shape=(1,)),
        TensorEntry(name="y", datatype=Datatype.INT64, shape=(1,)),
    )
    write_version(folder, name, graph, tensors)
