"""Weights in the safetensors format, read without its package.

Source: https://github.com/huggingface/safetensors, section Format: eight bytes of length, a JSON
header of that length, and the tensors' bytes, little-endian, in C order.
"""

import json
from pathlib import Path
from typing import Any

import torch

from converters.errors import SourceError

_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}


def is_safetensors(path: Path) -> bool:
    """Say whether a file of weights is safetensors; the other kind is torch's zip."""
    with path.open("rb") as file:
        return file.read(9)[8:] == b"{"


def read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a file by name, copied into memory.

    `converters.routes.source` has compared what the header declares with what the file holds.

    Raises:
        SourceError: a tensor has an element type that torch does not, or the file is damaged.
    """
    data = bytearray(path.read_bytes())
    length = int.from_bytes(data[:8], "little")
    try:
        header = json.loads(bytes(data[8 : 8 + length]))
        header.pop("__metadata__", None)
        held = memoryview(data)[8 + length :]
        return {name: _read_one(entry, held) for name, entry in header.items()}
    except (ValueError, KeyError, TypeError, RuntimeError) as exc:
        msg = f"{path.name} cannot be read as safetensors: {exc}"
        raise SourceError(msg) from exc


def _read_one(entry: dict[str, Any], held: memoryview) -> torch.Tensor:
    first, last = entry["data_offsets"]
    dtype = _DTYPES[entry["dtype"]]
    shape: list[int] = entry["shape"]
    if first == last:
        return torch.zeros(shape, dtype=dtype)
    # A copy: the bytes may lie where this type is not aligned.
    return torch.frombuffer(bytearray(held[first:last]), dtype=dtype).reshape(shape)
