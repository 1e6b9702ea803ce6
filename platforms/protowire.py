"""The wire format of Protocol Buffers, walked without a schema.

Owns the reading of one message's fields where they lie; nothing is copied, and nothing is nested:
who knows the schema decides which field holds a message and walks that. A hostile file costs time
linear in its size.

Source: https://protobuf.dev/programming-guides/encoding/
"""

import mmap
from collections.abc import Iterator
from typing import NamedTuple

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
_VARINT_MAX_BYTES = 10

Buffer = bytes | mmap.mmap


class Field(NamedTuple):
    """One field: what it holds lies at `start`…`end`, after its tag and length."""

    number: int
    wire_type: int
    start: int
    end: int


def iterate_fields(data: Buffer, start: int, end: int) -> Iterator[Field]:
    """Yield each field of the message at `start`…`end`.

    Raises:
        ValueError: this is not the wire format.
        IndexError: a number goes on beyond the data.
    """
    at = start
    while at < end:
        tag, at = read_varint(data, at)
        wire_type = tag & 7
        if wire_type == BYTES:
            length, at = read_varint(data, at)
            if at + length > end:
                msg = f"a field at byte {at} is longer than the message around it"
                raise ValueError(msg)
        else:
            length = _measure_number(data, at, wire_type)
        yield Field(tag >> 3, wire_type, at, at + length)
        at += length


def _measure_number(data: Buffer, at: int, wire_type: int) -> int:
    if wire_type == VARINT:
        return read_varint(data, at)[1] - at
    if wire_type == FIXED64:
        return 8
    if wire_type == FIXED32:
        return 4
    msg = f"wire type {wire_type} at byte {at}"
    raise ValueError(msg)


def read_varint(data: Buffer, at: int) -> tuple[int, int]:
    """Return the number at `at` and where it ends.

    Raises:
        ValueError: it has more than ten bytes.
        IndexError: it goes on beyond the data.
    """
    value = 0
    for position in range(_VARINT_MAX_BYTES):
        byte = data[at + position]
        value |= (byte & 0x7F) << (7 * position)
        if byte < 0x80:
            return value, at + position + 1
    msg = f"a number at byte {at} has no end"
    raise ValueError(msg)
