"""Sessions of ONNX Runtime on nets of a node or two, for tests of what runs them."""

from pathlib import Path
from typing import Any

import onnx
from onnx import TensorProto, helper

from platforms.runtimes.base import LoadOptions, Session
from platforms.runtimes.registry import get_runtime
from tests.harness.models import write_endless_model


def load_graph(
    path: Path,
    nodes: list[Any],
    taken: tuple[int, list[Any]] = (TensorProto.FLOAT, ["N", 2]),
    given: tuple[int, list[Any]] = (TensorProto.FLOAT, ["N", 2]),
) -> Session:
    """Write and load a model with an input `x` and an output `y`."""
    tensors = [
        helper.make_tensor_value_info(name, datatype, shape)
        for name, (datatype, shape) in (("x", taken), ("y", given))
    ]
    graph = helper.make_graph(nodes, "g", tensors[:1], tensors[1:])
    opset = helper.make_opsetid("", 18)
    onnx.save(helper.make_model(graph, opset_imports=[opset], ir_version=10), path)
    return get_runtime("ort").load(path, LoadOptions(threads=1))


def load_negation(folder: Path) -> Session:
    """Load `y = -x`, float32[N, M]: any width, rows are independent."""
    free = (TensorProto.FLOAT, ["N", "M"])
    return load_graph(folder / "neg.onnx", [helper.make_node("Neg", ["x"], ["y"])], free, free)


def load_table(folder: Path) -> Session:
    """Load `y = table[x]`, int64[N, 1] → float32[N, 1]: 0, 1, 2 work, any other index fails."""
    table = helper.make_tensor("t", TensorProto.FLOAT, [3, 1], [10, 20, 30])
    axes = helper.make_tensor("a", TensorProto.INT64, [1], [2])
    nodes = [
        helper.make_node("Constant", [], ["axes"], value=axes),
        helper.make_node("Constant", [], ["table"], value=table),
        helper.make_node("Gather", ["table", "x"], ["rows"]),
        helper.make_node("Squeeze", ["rows", "axes"], ["y"]),
    ]
    return load_graph(
        folder / "table.onnx", nodes, (TensorProto.INT64, ["N", 1]), (TensorProto.FLOAT, ["N", 1])
    )


def load_loop(folder: Path) -> Session:
    """Load a model that loops x times, int64[1] → int64[1]: 2⁶² is for ever."""
    write_endless_model(folder / "endless")
    return get_runtime("ort").load(folder / "endless" / "model.onnx", LoadOptions(threads=1))
