"""The tensors of a warm-up run.

Owns the making of them from a `WarmupSample`: zeros, seeded noise, or a file of raw tensor
data. Never runs a model.
"""

import struct
from pathlib import Path
from typing import Any

import numpy as np

from platforms.artifact import Datatype
from platforms.runtimes.base import DTYPES, Array
from worker.engine.modelconfig.serving import WarmupSample, WarmupSource, WarmupTensor
from worker.errors import ModelConfigError

_SEED = 7
_LENGTH = struct.Struct("<I")
_BYTE_VALUES = 256


def build_warmup(sample: WarmupSample, folder: Path, *, has_batch: bool) -> dict[str, Array]:
    """Return the inputs of one warm-up run, by name.

    Args:
        sample: the run.
        folder: the version's, which its data files are below.
        has_batch: put `sample.rows` in front of each shape.

    Raises:
        ModelConfigError: a data file is missing, outside the folder, or not of its shape.
    """
    rows = (sample.rows,) if has_batch else ()
    return {
        name: _build_tensor(sample.name, tensor, (*rows, *tensor.shape), folder)
        for name, tensor in sample.inputs.items()
    }


def _build_tensor(sample: str, tensor: WarmupTensor, shape: tuple[int, ...], folder: Path) -> Array:
    dtype = DTYPES.get(tensor.datatype)
    if dtype is None:
        msg = f"warm-up {sample!r}: {tensor.datatype} has no element type here"
        raise ModelConfigError(msg)
    if tensor.source is WarmupSource.FILE:
        return _read_tensor(sample, _find_file(sample, folder, tensor), dtype, shape)
    if tensor.source is WarmupSource.RANDOM:
        return _draw(tensor.datatype, dtype, shape)
    return np.full(shape, "" if dtype.hasobject else 0, dtype)


def _draw(datatype: Datatype, dtype: np.dtype[Any], shape: tuple[int, ...]) -> Array:
    """Return noise: 0–1 for floats, bytes' values for numbers where they fit, digits as text."""
    generator = np.random.default_rng(_SEED)
    if dtype.kind == "f":
        return generator.random(shape).astype(dtype)
    if datatype is Datatype.BOOL:
        return generator.integers(0, 2, shape).astype(dtype)
    top = 1 << 7 if datatype is Datatype.INT8 else _BYTE_VALUES
    values = generator.integers(0, top, shape)
    return values.astype(np.str_).astype(dtype) if dtype.hasobject else values.astype(dtype)


def _find_file(sample: str, folder: Path, tensor: WarmupTensor) -> Path:
    path = folder / (tensor.file or "")
    if not path.resolve().is_relative_to(folder.resolve()):
        msg = f"warm-up {sample!r}: {tensor.file!r} is outside the version's folder"
        raise ModelConfigError(msg)
    return path


def _read_tensor(sample: str, path: Path, dtype: np.dtype[Any], shape: tuple[int, ...]) -> Array:
    try:
        data = path.read_bytes()
    except OSError as exc:
        msg = f"warm-up {sample!r}: {path.name} cannot be read: {exc.strerror}"
        raise ModelConfigError(msg) from exc
    try:
        if dtype.hasobject:
            return np.array(_split(data), object).reshape(shape)
        return np.frombuffer(data, dtype.newbyteorder("<")).reshape(shape).astype(dtype)
    except (ValueError, struct.error) as exc:
        msg = f"warm-up {sample!r}: {path.name} is no tensor of shape {list(shape)}: {exc}"
        raise ModelConfigError(msg) from exc


def _split(data: bytes) -> list[str]:
    """Return the elements of BYTES data: a 4-byte little-endian length before each."""
    found, at = [], 0
    while at < len(data):
        (length,) = _LENGTH.unpack_from(data, at)
        at += _LENGTH.size
        if at + length > len(data):
            msg = f"the element at byte {at} is longer than the data"
            raise ValueError(msg)
        found.append(data[at : at + length].decode("utf-8"))
        at += length
    return found
