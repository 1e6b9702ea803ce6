"""Where an ONNX file says its external weights are, read without the onnx package.

Owns a walk over the protobuf wire format that visits every place a tensor can be
in: initializers, attributes, subgraphs, functions, sparse tensors. Never reads the
weights, and never recurses: a hostile file costs time linear in its size.

Source: onnx.proto3 of onnx 1.23 for the field numbers;
https://protobuf.dev/programming-guides/encoding/ for the wire format.
"""

import mmap
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType

from platforms.errors import ModelLoadError

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_VARINT_MAX_BYTES = 10

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
        "sparse": {1: "tensor", 2: "tensor"},
        "tensor": {13: "entry"},
    }
)
"""Message → field number → the message inside, for those that lead to a tensor."""

_ENTRY_KEY, _ENTRY_VALUE = 1, 2


def read_external_locations(path: Path) -> tuple[str, ...]:
    """Return the `location` of every tensor whose data is outside the file, each once.

    Raises:
        ModelLoadError: the file cannot be read or is not in protobuf's wire format.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return tuple(dict.fromkeys(_find_locations(data)))
    except (OSError, ValueError, IndexError) as exc:
        msg = f"{path.name} cannot be read as an ONNX model: {exc}"
        raise ModelLoadError(msg) from exc


def _find_locations(data: mmap.mmap) -> Iterator[str]:
    pending = [("model", 0, len(data))]
    while pending:
        kind, start, end = pending.pop()
        if kind == "entry":
            key, value = _read_entry(data, start, end)
            if key == b"location":
                yield value.decode("utf-8")
            continue
        children = _CHILDREN[kind]
        for number, child_start, child_end in _iterate_fields(data, start, end):
            if number in children:
                pending.append((children[number], child_start, child_end))


def _read_entry(data: mmap.mmap, start: int, end: int) -> tuple[bytes, bytes]:
    found = {number: data[a:b] for number, a, b in _iterate_fields(data, start, end)}
    return found.get(_ENTRY_KEY, b""), found.get(_ENTRY_VALUE, b"")


def _iterate_fields(data: mmap.mmap, start: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Yield (field number, start, end) of each length-delimited field of one message."""
    at = start
    while at < end:
        tag, at = _read_varint(data, at)
        wire_type = tag & 7
        if wire_type == _BYTES:
            length, at = _read_varint(data, at)
            if at + length > end:
                msg = f"a field at byte {at} is longer than the message around it"
                raise ValueError(msg)
            yield tag >> 3, at, at + length
            at += length
        else:
            at = _skip_number(data, at, wire_type)


def _skip_number(data: mmap.mmap, at: int, wire_type: int) -> int:
    if wire_type == _VARINT:
        return _read_varint(data, at)[1]
    if wire_type == _FIXED64:
        return at + 8
    if wire_type == _FIXED32:
        return at + 4
    msg = f"wire type {wire_type} at byte {at}"
    raise ValueError(msg)


def _read_varint(data: mmap.mmap, at: int) -> tuple[int, int]:
    """Return the number at `at` and where it ends; IndexError at the end of the file."""
    value = 0
    for position in range(_VARINT_MAX_BYTES):
        byte = data[at + position]
        value |= (byte & 0x7F) << (7 * position)
        if byte < 0x80:
            return value, at + position + 1
    msg = f"a number at byte {at} has no end"
    raise ValueError(msg)
