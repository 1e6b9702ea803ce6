"""What stands in an ONNX graph, and what a recipe changed in it.

Owns the counting that recipes are chosen by, and the finding that a recipe did nothing. Imports
`onnx` inside, as only the process of a hop may.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from converters.errors import CompressionError

QUANTIZED_OPERATORS = frozenset(
    {
        "ConvInteger",
        "DequantizeLinear",
        "DynamicQuantizeLSTM",
        "DynamicQuantizeLinear",
        "DynamicQuantizeMatMul",
        "GatherBlockQuantized",
        "MatMulBnb4",
        "MatMulInteger",
        "MatMulIntegerToFloat",
        "MatMulNBits",
        "QAttention",
        "QGemm",
        "QLinearConv",
        "QLinearMatMul",
        "QuantizeLinear",
    }
)
"""Nodes that work on, or make, numbers of 8 bits and fewer. Source: ONNX operators (opset 21)
and ONNX Runtime's contrib operators (1.32)."""

_LARGEST = 5


@dataclass(frozen=True)
class Census:
    """What a graph is made of."""

    operators: Mapping[str, int]
    """Operator → nodes, sub-graphs included."""
    weight_bytes: Mapping[str, int]
    """Element type, such as `FLOAT` → bytes of the weights."""

    @property
    def quantized_nodes(self) -> int:
        """How many nodes are of `QUANTIZED_OPERATORS`."""
        return sum(n for name, n in self.operators.items() if name in QUANTIZED_OPERATORS)


def count_operators(path: Path) -> dict[str, int]:
    """Return operator → nodes of an ONNX file, sub-graphs included; its weights are not read."""
    return dict(Counter(n.op_type for n in _iter_nodes(read_model(path, weights=False).graph)))


def take_census(path: Path) -> Census:
    """Count an ONNX file's nodes and the bytes of its weights; blocks for as long as it is read."""
    import onnx

    graph = read_model(path, weights=False).graph
    sizes: Counter[str] = Counter()
    for weight in _iter_weights(graph):
        kind = onnx.TensorProto.DataType.Name(weight.data_type)
        sizes[kind] += _measure(weight, onnx)
    return Census(dict(Counter(node.op_type for node in _iter_nodes(graph))), dict(sizes))


def read_model(path: Path, *, weights: bool = True) -> Any:
    """Return an ONNX file as `onnx.ModelProto`.

    Args:
        path: of the file.
        weights: False leaves out those that lie in files beside it.

    Raises:
        CompressionError: it cannot be read as ONNX.
    """
    import onnx
    from google.protobuf.message import DecodeError

    try:
        return onnx.load(str(path), load_external_data=weights)
    except (DecodeError, OSError, ValueError, onnx.checker.ValidationError) as exc:
        msg = f"{path.name} cannot be read as ONNX: {exc}"
        raise CompressionError(msg) from exc


def _measure(weight: Any, onnx: Any) -> int:
    values = 1
    for axis in weight.dims:
        values *= axis
    bits = {"INT4": 4, "UINT4": 4, "INT2": 2, "UINT2": 2}
    name = onnx.TensorProto.DataType.Name(weight.data_type)
    if name in bits:
        return int(values * bits[name] + 7) // 8
    if name == "STRING":
        return sum(len(text) for text in weight.string_data)
    return int(values * onnx.helper.tensor_dtype_to_np_dtype(weight.data_type).itemsize)


def _iter_nodes(graph: Any) -> Iterator[Any]:
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            inner = [attribute.g] if attribute.HasField("g") else attribute.graphs
            for sub_graph in inner:
                yield from _iter_nodes(sub_graph)


def _iter_weights(graph: Any) -> Iterator[Any]:
    yield from graph.initializer
    for node in _iter_nodes(graph):
        for attribute in node.attribute:
            if node.op_type == "Constant" and attribute.HasField("t"):
                yield attribute.t
            inner = [attribute.g] if attribute.HasField("g") else attribute.graphs
            for sub_graph in inner:
                yield from sub_graph.initializer


def explain_no_op(before: Census, after: Census, wanted: str) -> str | None:
    """Return why a quantized graph is the old one in all that matters, or None.

    Args:
        before: of the source.
        after: of the result.
        wanted: the operators that the recipe looks for, such as "MatMul".
    """
    if after.quantized_nodes > before.quantized_nodes:
        return None
    counted = sorted(before.operators.items(), key=lambda item: -item[1])[:_LARGEST]
    listed = ", ".join(f"{name} {count}" for name, count in counted)
    return f"no node was quantized: the recipe takes {wanted} with constant weights, found {listed}"


def explain_no_fp16(before: Census, after: Census) -> str | None:
    """Return why a graph has no more fp16 weights than before, or None."""
    if after.weight_bytes.get("FLOAT16", 0) > before.weight_bytes.get("FLOAT16", 0):
        return None
    return "no weight was turned into fp16"


def name_nodes(model: Any) -> int:
    """Give every node without a name, or with another's, one of its own; return how many.

    Quantizers name what to leave out; by a name that two nodes share they would leave out both.
    """
    seen: set[str] = set()
    renamed = 0
    for number, node in enumerate(model.graph.node):
        if not node.name or node.name in seen:
            node.name = f"{node.op_type}_{number}_edgeward"
            renamed += 1
        seen.add(node.name)
    return renamed
