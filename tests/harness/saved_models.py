"""A TensorFlow SavedModel written by hand: the protobuf wire format, without TensorFlow.

Source: field numbers of tensorflow/core/protobuf/{saved_model,meta_graph}.proto and
tensorflow/core/framework/{graph,node_def,attr_value,tensor,tensor_shape}.proto.
"""

import struct
from collections.abc import Mapping
from pathlib import Path

_FLOAT = 1
_VARINT, _BYTES = 0, 2


def _varint(value: int) -> bytes:
    # Negative numbers are 64 bits in two's complement.
    value &= (1 << 64) - 1
    out = bytearray()
    while True:
        value, low = value >> 7, value & 0x7F
        out.append(low | (0x80 if value else 0))
        if not value:
            return bytes(out)


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3 | _VARINT) + _varint(value)


def _part(field: int, data: bytes | str) -> bytes:
    raw = data.encode() if isinstance(data, str) else data
    return _varint(field << 3 | _BYTES) + _varint(len(raw)) + raw


def _entry(field: int, key: str, value: bytes) -> bytes:
    return _part(field, _part(1, key) + _part(2, value))


def _shape(axes: tuple[int, ...]) -> bytes:
    return b"".join(_part(2, _number(1, axis)) for axis in axes)


def _node(name: str, op: str, inputs: tuple[str, ...], attributes: Mapping[str, bytes]) -> bytes:
    body = _part(1, name) + _part(2, op) + b"".join(_part(3, one) for one in inputs)
    return _part(1, body + b"".join(_entry(5, key, value) for key, value in attributes.items()))


def _tensor_info(name: str, axes: tuple[int, ...]) -> bytes:
    return _part(1, name) + _number(2, _FLOAT) + _part(3, _shape(axes))


def write_saved_model(folder: Path, factor: float) -> Path:
    """Write `y = factor · x`, float32[N, 2], as a SavedModel; return its `saved_model.pb`."""
    floats = {"T": _number(6, _FLOAT)}
    value = _number(1, _FLOAT) + _part(2, b"") + _part(4, struct.pack("<f", factor))
    graph = (
        _node(
            "x",
            "Placeholder",
            (),
            {"dtype": _number(6, _FLOAT), "shape": _part(7, _shape((-1, 2)))},
        )
        + _node("factor", "Const", (), {"dtype": _number(6, _FLOAT), "value": _part(8, value)})
        + _node("y", "Mul", ("x", "factor"), floats)
        + _part(4, _number(1, 1000))
    )
    signature = (
        _entry(1, "x", _tensor_info("x:0", (-1, 2)))
        + _entry(2, "y", _tensor_info("y:0", (-1, 2)))
        + _part(3, "tensorflow/serving/predict")
    )
    info = _part(4, "serve") + _part(5, "2.21.0")
    meta = _part(1, info) + _part(2, graph) + _entry(5, "serving_default", signature)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "saved_model.pb"
    path.write_bytes(_number(1, 1) + _part(2, meta))
    return path
