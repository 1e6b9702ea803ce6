"""What people put into batch folders, and what they find there afterwards."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

DAMAGED = b"this is no array"


def put_file(folder: Path, name: str, content: bytes) -> Path:
    """Write a file under a name that is never taken, then rename it."""
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / f"{name}.part"
    part.write_bytes(content)
    return part.rename(folder / name)


def put_arrays(folder: Path, names: Iterable[str]) -> None:
    """Put one row for the tiny model into each of these files."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        part = folder / f"{name}.part"
        with part.open("wb") as file:
            np.save(file, np.full((1, 64), 0.5, np.float32))
        part.rename(folder / name)


def array_bytes() -> bytes:
    """Return one row for the tiny model as the bytes of a .npy file."""
    head = b"\x93NUMPY\x01\x00"
    text = b"{'descr': '<f4', 'fortran_order': False, 'shape': (1, 64), }"
    text += b" " * (118 - len(text) - 1) + b"\n"
    return head + len(text).to_bytes(2, "little") + text + np.full(64, 0.5, "<f4").tobytes()


def read_lines(outbox: Path) -> list[dict[str, Any]]:
    """Return the whole lines of the results files of one model."""
    return [
        json.loads(line)
        for file in sorted(outbox.glob("*.jsonl"))
        for line in file.read_text().splitlines(keepends=True)
        if line.endswith("\n")
    ]


def list_names(folder: Path) -> set[str]:
    """Return the names in a folder, none where there is no folder."""
    return {path.name for path in folder.iterdir()} if folder.is_dir() else set()
