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
from platforms.protowire import BYTES, iterate_fields

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
        for field in iterate_fields(data, start, end):
            if field.wire_type == BYTES and field.number in children:
                pending.append((children[field.number], field.start, field.end))


def _read_entry(data: mmap.mmap, start: int, end: int) -> tuple[bytes, bytes]:
    found = {
        field.number: data[field.start : field.end]
        for field in iterate_fields(data, start, end)
        if field.wire_type == BYTES
    }
    return found.get(_ENTRY_KEY, b""), found.get(_ENTRY_VALUE, b"")
