"""Constants of a Core ML program: how they are stored, and what they are.

Owns the reading of immediate values and of the weights' file, whose entries begin with a header of
64 bytes: a sentinel, the element type, the size in bytes and where the data lies, little-endian.
Elements of fewer than 8 bits are packed, the first in the lowest bits.

Source: MIL.proto of coremltools 9.0; its `mlmodel/src/MILBlob/Blob/StorageFormat.hpp`.
"""

import math
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from converters.errors import MilOperatorError, SourceError
from platforms.artifact import Datatype
from platforms.runtimes.base import Array

Value = Array | str | list["Value"]
"""A tensor, a text, or several values for a parameter that takes them."""

_HEADER = struct.Struct("<IIQQQ")
_SENTINEL = 0xDEADBEEF
_PREFIX = "@model_path/"

# MIL.proto's DataType.
_BOOL, _STRING, _FLOAT16, _FLOAT32 = 1, 2, 10, 11
_DTYPES: Mapping[int, np.dtype[Any]] = {
    _BOOL: np.dtype(np.bool_),
    _FLOAT16: np.dtype("<f2"),
    _FLOAT32: np.dtype("<f4"),
    12: np.dtype("<f8"),
    21: np.dtype("i1"),
    22: np.dtype("<i2"),
    23: np.dtype("<i4"),
    24: np.dtype("<i8"),
    31: np.dtype("u1"),
    32: np.dtype("<u2"),
    33: np.dtype("<u4"),
    34: np.dtype("<u8"),
}
_INT4 = 25
_BITS: Mapping[int, int] = {_INT4: 4, 35: 4, 36: 2, 37: 1, 38: 6, 39: 3}
"""Bits of an element where that is no whole byte."""
_DATATYPES: Mapping[int, Datatype] = {
    _BOOL: Datatype.BOOL,
    _FLOAT16: Datatype.FP16,
    _FLOAT32: Datatype.FP32,
    23: Datatype.INT32,
}


def is_half(value_type: Any) -> bool:
    """Say whether a `ValueType` is a tensor of 16-bit floats."""
    return bool(value_type.tensorType.dataType == _FLOAT16)


def get_datatype(value_type: Any) -> Datatype | None:
    """Return the element type of a tensor that may be an input or output, else None."""
    return _DATATYPES.get(value_type.tensorType.dataType)


def read_shape(value_type: Any) -> tuple[int, ...]:
    """Return a tensor type's shape, −1 for what is not known."""
    return tuple(
        int(axis.constant.size) if axis.WhichOneof("dimension") == "constant" else -1
        for axis in value_type.tensorType.dimensions
    )


def read_value(value: Any, folder: Path) -> Value:
    """Return what a `Value` message holds.

    Args:
        value: of MIL.proto.
        folder: the package's `Data/com.apple.CoreML`, in which the weights' file is named.

    Raises:
        MilOperatorError: it is of a kind that is not read here.
        SourceError: the weights' file does not hold it, or lies elsewhere.
    """
    kind = value.type.tensorType.dataType
    shape = read_shape(value.type)
    if value.WhichOneof("value") == "blobFileValue":
        found = value.blobFileValue
        return _decode(_read_blob(folder, found.fileName, found.offset), kind, shape)
    if value.immediateValue.WhichOneof("value") != "tensor":
        stored = value.immediateValue.WhichOneof("value")
        msg = f"a constant is stored as {stored}, which the reference interpreter does not read"
        raise MilOperatorError(msg)
    return _read_immediate(value.immediateValue.tensor, kind, shape)


def _read_immediate(tensor: Any, kind: int, shape: Sequence[int]) -> Value:
    name = tensor.WhichOneof("value")
    values = getattr(tensor, name).values
    if kind == _STRING:
        return str(values[0])
    if name == "bytes":
        return _decode(bytes(values), kind, shape)
    if kind not in _DTYPES:
        raise MilOperatorError(_describe_kind(kind))
    return np.array(values, _DTYPES[kind]).reshape(shape)


def _read_blob(folder: Path, name: str, offset: int) -> bytes:
    path = (folder / name.removeprefix(_PREFIX)).resolve()
    if not path.is_relative_to(folder.resolve()):
        msg = f"the program keeps weights in {name!r}, outside its own folder"
        raise SourceError(msg)
    try:
        with path.open("rb") as file:
            file.seek(offset)
            sentinel, _, size, start, _ = _HEADER.unpack(file.read(_HEADER.size))
            if sentinel != _SENTINEL or start + size > path.stat().st_size:
                msg = f"{path.name} has no weights at {offset}"
                raise SourceError(msg)
            file.seek(start)
            return file.read(size)
    except (OSError, struct.error) as exc:
        msg = f"the weights' file {path.name} cannot be read: {exc}"
        raise SourceError(msg) from exc


def _decode(data: bytes, kind: int, shape: Sequence[int]) -> Array:
    count = math.prod(shape)
    if kind in _BITS:
        unpacked = unpack_bits(np.frombuffer(data, np.uint8), _BITS[kind], count)
        if kind == _INT4:
            signed = unpacked.astype(np.int8)
            unpacked = np.where(signed > 7, signed - 16, signed)
        return unpacked.reshape(shape)
    if kind not in _DTYPES:
        raise MilOperatorError(_describe_kind(kind))
    dtype = _DTYPES[kind]
    if len(data) < count * dtype.itemsize:
        msg = f"a constant of shape {list(shape)} has {len(data)} bytes only"
        raise SourceError(msg)
    return np.frombuffer(data, dtype, count).reshape(shape)


def unpack_bits(data: Array, bits: int, count: int) -> Array:
    """Return `uint8[count]` from elements of `bits` bits, packed from the lowest bit on."""
    stream = np.unpackbits(data, bitorder="little")[: count * bits].reshape(count, bits)
    weights = 1 << np.arange(bits, dtype=np.uint8)
    elements: Array = (stream * weights).sum(axis=1).astype(np.uint8)
    return elements


def _describe_kind(kind: int) -> str:
    return f"a constant has element type {kind} of MIL.proto, which is not read here"
