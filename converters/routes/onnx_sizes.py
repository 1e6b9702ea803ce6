"""What an ONNX file declares against what it holds, read without the onnx package.

A file of a kilobyte may declare a tensor of gigabytes, and whoever opens it takes the memory.
Owns a walk over every tensor (initializers, attributes, subgraphs, functions, sparse tensors)
that compares the two before any library sees the file.

What a graph computes while it runs (a huge `ConstantOfShape`) is not seen here; a step's memory
limit is for that.

Source: onnx.proto3 of onnx 1.23 for the field numbers and element types.
"""

import math
import mmap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

from converters.errors import OversizedTensorError, SourceError
from platforms.protowire import BYTES, VARINT, iterate_fields, read_varint

_CHILDREN: Mapping[str, Mapping[int, str]] = MappingProxyType(
    {
        "model": {7: "graph", 20: "training", 25: "function"},
        "training": {1: "graph", 2: "graph"},
        "function": {7: "node", 11: "attribute"},
        "graph": {1: "node", 5: "tensor", 15: "sparse"},
        "node": {5: "attribute"},
        "attribute": {
            5: "tensor",
            6: "graph",
            10: "tensor",
            11: "graph",
            22: "sparse",
            23: "sparse",
        },
    }
)
"""Message → field number → the message inside, for those that lead to a tensor."""

_DIMS, _DATA_TYPE, _NAME, _EXTERNAL, _LOCATION = 1, 2, 8, 13, 14
_DATA_FIELDS = frozenset({4, 5, 6, 7, 9, 10, 11})
_IS_EXTERNAL = 1
_SPARSE_VALUES, _SPARSE_DIMS = 1, 3

_ITEM_BITS: Mapping[int, int] = MappingProxyType(
    {
        **dict.fromkeys((2, 3, 9, 17, 18, 19, 20, 24), 8),
        **dict.fromkeys((4, 5, 10, 16), 16),
        **dict.fromkeys((1, 6, 12), 32),
        **dict.fromkeys((7, 11, 13, 14), 64),
        15: 128,
        **dict.fromkeys((21, 22, 23), 4),
        **dict.fromkeys((25, 26), 2),
    }
)
"""Bits of one element by TensorProto.DataType; texts (8) count as one byte."""

_ALLOWED_FACTOR = 16
"""A 64-bit number may be packed into one byte, and a field's length counts bytes."""
_ALLOWED_BYTES = 1 << 20
"""Declared beyond that without being held; below it nothing is worth refusing."""
_SPARSE_FACTOR, _SPARSE_BYTES = 1000, 1 << 26
"""A sparse tensor may stand for this many times what it holds, or for this much."""


@dataclass
class _Tensor:
    """What one TensorProto says of itself."""

    name: str = ""
    axes: list[int] = field(default_factory=list)
    item_bits: int = 8
    held_bytes: int = 0
    is_external: bool = False
    external: dict[str, str] = field(default_factory=dict)

    @property
    def declared_bytes(self) -> int:
        return _count(self.axes) * self.item_bits // 8


def _count(axes: list[int]) -> int:
    # 64 bits in two's complement: a negative axis reads as a very large one, and is refused.
    return math.prod(axes)


def verify_declared_sizes(path: Path) -> None:
    """Compare every tensor of an ONNX file with the bytes that are there for it.

    Raises:
        OversizedTensorError: one is declared far larger than what is held.
        SourceError: the file cannot be read or is not in protobuf's wire format.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            for kind, start, end in _find_tensors(data):
                if kind == "sparse":
                    _verify_sparse(path, data, start, end)
                else:
                    _verify_tensor(path, _read_tensor(data, start, end))
    except (OSError, ValueError, IndexError) as exc:
        msg = f"{path.name} cannot be read as an ONNX model: {exc}"
        raise SourceError(msg) from exc


def _find_tensors(data: mmap.mmap) -> Iterator[tuple[str, int, int]]:
    pending = [("model", 0, len(data))]
    while pending:
        kind, start, end = pending.pop()
        if kind not in _CHILDREN:
            yield kind, start, end
            continue
        children = _CHILDREN[kind]
        for found in iterate_fields(data, start, end):
            if found.wire_type == BYTES and found.number in children:
                pending.append((children[found.number], found.start, found.end))


def _read_tensor(data: mmap.mmap, start: int, end: int) -> _Tensor:
    tensor = _Tensor()
    for found in iterate_fields(data, start, end):
        if found.number == _DIMS:
            tensor.axes += _read_numbers(data, found.wire_type, found.start, found.end)
        elif found.number == _DATA_TYPE:
            tensor.item_bits = _ITEM_BITS.get(read_varint(data, found.start)[0], 8)
        elif found.number == _NAME:
            tensor.name = data[found.start : found.end].decode(errors="replace")
        elif found.number == _LOCATION:
            tensor.is_external = read_varint(data, found.start)[0] == _IS_EXTERNAL
        elif found.number == _EXTERNAL:
            key, value = _read_entry(data, found.start, found.end)
            tensor.external[key] = value
        elif found.number in _DATA_FIELDS:
            tensor.held_bytes += found.end - found.start
    return tensor


def _read_numbers(data: mmap.mmap, wire_type: int, start: int, end: int) -> Iterator[int]:
    """Yield the numbers of a repeated field, packed or one by one."""
    if wire_type == VARINT:
        yield read_varint(data, start)[0]
        return
    at = start
    while at < end:
        value, at = read_varint(data, at)
        yield value


def _read_entry(data: mmap.mmap, start: int, end: int) -> tuple[str, str]:
    parts = {
        found.number: data[found.start : found.end].decode(errors="replace")
        for found in iterate_fields(data, start, end)
    }
    return parts.get(1, ""), parts.get(2, "")


def _verify_tensor(path: Path, tensor: _Tensor) -> None:
    held = _measure_external(path, tensor) if tensor.is_external else tensor.held_bytes
    if tensor.declared_bytes > held * _ALLOWED_FACTOR + _ALLOWED_BYTES:
        msg = (
            f"{path.name} declares the tensor {tensor.name!r} with {_say(tensor.declared_bytes)} "
            f"and holds {_say(held)} of it"
        )
        raise OversizedTensorError(msg)


def _measure_external(path: Path, tensor: _Tensor) -> int:
    """Return how many bytes of a tensor are in the file that it names.

    Raises:
        OversizedTensorError: it names more than that file has.
        ValueError: its place is no number.
    """
    place = path.parent / tensor.external.get("location", "")
    offset = int(tensor.external.get("offset") or 0)
    size = place.stat().st_size
    length = int(tensor.external.get("length") or max(size - offset, 0))
    if offset < 0 or length < 0 or offset + length > size:
        msg = (
            f"{path.name} expects {_say(length)} of the tensor {tensor.name!r} at byte {offset} of "
            f"{place.name}, which has {_say(size)}"
        )
        raise OversizedTensorError(msg)
    return length


def _verify_sparse(path: Path, data: mmap.mmap, start: int, end: int) -> None:
    axes: list[int] = []
    values = _Tensor()
    for found in iterate_fields(data, start, end):
        if found.number == _SPARSE_DIMS:
            axes += _read_numbers(data, found.wire_type, found.start, found.end)
        elif found.number == _SPARSE_VALUES:
            values = _read_tensor(data, found.start, found.end)
    _verify_tensor(path, values)
    declared = _count(axes) * values.item_bits // 8
    if declared > max((end - start) * _SPARSE_FACTOR, _SPARSE_BYTES):
        msg = (
            f"{path.name} declares a sparse tensor {values.name!r} that stands for "
            f"{_say(declared)} and holds {_say(end - start)}"
        )
        raise OversizedTensorError(msg)


def _say(size_bytes: int) -> str:
    """Return a size for a person: bytes, or MB of 10⁶ bytes."""
    return f"{size_bytes} bytes" if size_bytes < 10**6 else f"{size_bytes / 10**6:.0f} MB"
