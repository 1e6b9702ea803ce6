"""One tensor on the wire: JSON `data` or raw bytes on one side, an array on the other.

Owns the protocol's forms of every datatype. Binary is little-endian and row-major, BOOL one byte,
BYTES a 4-byte length before each element; JSON is nested or flat.

Invariants: an array holds exactly what was sent, or the request is refused: no number is rounded to
a whole one, cut to a range or read from a text; nothing larger than what was sent is allocated
before its size has been checked. BF16 is refused: NumPy has no such type.

Source: https://github.com/kserve/open-inference-protocol and Triton's `extension_binary_data.md`.
"""

import json
import sys
from collections.abc import Sequence
from itertools import chain
from math import prod
from typing import Any

import numpy as np
import orjson

from platforms.artifact import Datatype
from platforms.runtimes.base import DATATYPES, DTYPES, Array
from worker.rest.errors import RequestFormatError

AXES_MAX = 32
"""Of a tensor; NumPy before 2 takes no more."""
_AXIS_MAX = 2**31 - 1
_LENGTH_BYTES = 4
_IS_BIG_ENDIAN = sys.byteorder == "big"


def parse_datatype(name: str, value: Any) -> Datatype:
    """Return the datatype of a tensor.

    Raises:
        RequestFormatError: it is unknown, or BF16.
    """
    try:
        datatype = Datatype(value)
    except ValueError as exc:
        msg = f"input {name!r} has the unknown datatype {value!r:.40}"
        raise RequestFormatError(msg) from exc
    if datatype not in DTYPES:
        msg = f"input {name!r}: {datatype} is not supported; send FP32 or FP16"
        raise RequestFormatError(msg)
    return datatype


def parse_shape(name: str, value: Any) -> tuple[int, ...]:
    """Return the shape of a tensor.

    Raises:
        RequestFormatError: it is no list of whole numbers that a tensor may have.
    """
    is_list = isinstance(value, list) and len(value) <= AXES_MAX
    # `type`, as True is an int to isinstance.
    if is_list and all(type(axis) is int and 0 <= axis <= _AXIS_MAX for axis in value):
        return tuple(value)
    msg = f"input {name!r}: shape must be a list of up to {AXES_MAX} whole numbers from 0 on"
    raise RequestFormatError(msg)


# --- from the wire --------------------------------------------------------------------------


def read_binary(
    name: str, datatype: Datatype, shape: tuple[int, ...], body: bytes, start: int, size: int
) -> Array:
    """Return the tensor in `body[start : start + size]`; read-only, a view where it can be.

    Raises:
        RequestFormatError: the bytes are not as many as the shape needs, or no BYTES elements.
    """
    if datatype is Datatype.BYTES:
        return _read_texts(name, shape, body[start : start + size])
    dtype = DTYPES[datatype]
    count = prod(shape)
    if count * dtype.itemsize != size:
        msg = (
            f"input {name!r}: {size} bytes, where {datatype} of shape {list(shape)} "
            f"has {count * dtype.itemsize}"
        )
        raise RequestFormatError(msg)
    if datatype is Datatype.BOOL:
        # Any byte but 0 is true; a NumPy bool of another byte than 0 and 1 is undefined.
        return _shape(name, np.frombuffer(body, np.uint8, count, start) != 0, shape)
    flat = np.frombuffer(body, dtype, count, start)
    if _IS_BIG_ENDIAN:
        flat = flat.byteswap()
    elif not flat.flags.aligned:
        # The JSON in front has any length; not every runtime reads unaligned numbers.
        flat = flat.copy()
    return _shape(name, flat, shape)


def _read_texts(name: str, shape: tuple[int, ...], part: bytes) -> Array:
    texts: list[str] = []
    place, end = 0, len(part)
    try:
        while place < end:
            size = int.from_bytes(part[place : place + _LENGTH_BYTES], "little")
            place += _LENGTH_BYTES
            if place + size > end:
                msg = f"input {name!r}: an element of {size} bytes reaches beyond the tensor's end"
                raise RequestFormatError(msg)
            texts.append(part[place : place + size].decode())
            place += size
    except UnicodeDecodeError as exc:
        msg = f"input {name!r}: BYTES elements must be UTF-8 here ({exc.reason})"
        raise RequestFormatError(msg) from exc
    return _to_texts(name, shape, texts)


def _to_texts(name: str, shape: tuple[int, ...], texts: Sequence[object]) -> Array:
    _check_count(name, shape, len(texts))
    array = np.empty(len(texts), np.object_)
    array[:] = texts
    return _shape(name, array, shape)


def _check_count(name: str, shape: tuple[int, ...], count: int) -> None:
    if prod(shape) != count:
        msg = f"input {name!r}: {count} elements, where the shape {list(shape)} has {prod(shape)}"
        raise RequestFormatError(msg)


def _shape(name: str, flat: Array, shape: tuple[int, ...]) -> Array:
    try:
        return flat.reshape(shape)
    except ValueError as exc:
        # An empty tensor whose other axes multiply to more than an address has bits.
        msg = f"input {name!r}: no tensor can have the shape {list(shape)}"
        raise RequestFormatError(msg) from exc


def read_json(name: str, datatype: Datatype, shape: tuple[int, ...], data: object) -> Array:
    """Return the tensor that JSON's `data` holds, nested or flat.

    Raises:
        RequestFormatError: the elements are not as many as the shape needs, not of the
            datatype's kind, or out of its range.
    """
    flat = _flatten(name, data)
    _check_count(name, shape, len(flat))
    kinds = set(map(type, flat))
    dtype = DTYPES[datatype]
    wanted: dict[str, set[type]] = {
        "b": {bool},
        "i": {int},
        "u": {int},
        "f": {int, float},
        "O": {str},
    }
    if not kinds <= wanted[dtype.kind]:
        odd = next(item for item in flat if type(item) not in wanted[dtype.kind])
        msg = f"input {name!r}: {odd!r:.40} is no {datatype}"
        raise RequestFormatError(msg)
    if dtype.kind == "O":
        return _to_texts(name, shape, flat)
    return _shape(name, _to_numbers(name, datatype, flat), shape)


def _flatten(name: str, data: object) -> list[Any]:
    if not isinstance(data, list):
        msg = f"input {name!r}: data must be a list"
        raise RequestFormatError(msg)
    while data and type(data[0]) is list:
        if set(map(type, data)) != {list}:
            msg = f"input {name!r}: data holds lists beside elements"
            raise RequestFormatError(msg)
        data = list(chain.from_iterable(data))
    return data


def _to_numbers(name: str, datatype: Datatype, flat: list[Any]) -> Array:
    dtype = DTYPES[datatype]
    if dtype.kind in "iu" and flat:
        limits = np.iinfo(dtype)
        if min(flat) < limits.min or max(flat) > limits.max:
            msg = f"input {name!r}: a number is out of {datatype}'s range"
            raise RequestFormatError(msg)
    if dtype.kind != "f":
        return np.array(flat, dtype)
    try:
        with np.errstate(over="raise"):
            return np.array(flat, np.float64).astype(dtype, copy=False)
    except (FloatingPointError, OverflowError) as exc:
        msg = f"input {name!r}: a number is out of {datatype}'s range"
        raise RequestFormatError(msg) from exc


# --- to the wire ----------------------------------------------------------------------------


def get_datatype(array: Array) -> Datatype:
    """Return the protocol's name of an array's element type."""
    return DATATYPES[array.dtype]


def write_binary(array: Array) -> Any:
    """Return an array's bytes, as a buffer of the array itself where that is possible."""
    if array.dtype.kind == "O":
        return b"".join(map(_prefix, array.ravel().tolist()))
    array = np.ascontiguousarray(array)
    if _IS_BIG_ENDIAN:
        array = array.byteswap()
    return array.data if array.size else b""


def count_bytes(tail: Any) -> int:
    """Return the length of what `write_binary` returned."""
    return len(tail) if isinstance(tail, bytes) else int(tail.nbytes)


def _prefix(item: object) -> bytes:
    text = item if isinstance(item, bytes) else str(item).encode("utf-8", "surrogateescape")
    return len(text).to_bytes(_LENGTH_BYTES, "little") + text


def write_json(array: Array) -> bytes:
    """Return an array as a flat JSON list.

    NaN and the infinities are written as `NaN` and `Infinity`, as Triton does and its clients
    read: `null` would be read as another value.
    """
    flat = np.ascontiguousarray(array).reshape(-1)
    if flat.dtype.kind == "O":
        return orjson.dumps([_to_text(item) for item in flat])
    if flat.dtype.kind == "f" and not np.isfinite(flat).all():
        return json.dumps(flat.tolist(), separators=(",", ":")).encode()
    return orjson.dumps(flat, option=orjson.OPT_SERIALIZE_NUMPY)


def _to_text(item: object) -> str:
    return item.decode("utf-8", "replace") if isinstance(item, bytes) else str(item)
