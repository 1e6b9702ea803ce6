"""Records a run: compiles the recorder, starts the workload below it, reads the record.

The record is whole or it is refused: at its end the files that it describes must be,
byte for byte, those on the disk.
"""

import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import NamedTuple

_SOURCE = Path(__file__).with_name("recorder.c")
_REPOSITORY = Path(__file__).resolve().parents[3]
_HEAD = struct.Struct("=BHQQI")
_RUN_LIMIT_S = 120.0
MARKS = "marks"


class Kind(Enum):
    """What a call did."""

    CREATED = "c"
    WRITTEN = "w"
    TRUNCATED = "t"
    ALLOCATED = "a"
    SYNCED = "s"
    UNLINKED = "u"
    RENAMED = "r"
    MAPPED = "m"
    FOLDER_MADE = "d"
    FOLDER_REMOVED = "x"
    LINKED = "l"
    SYMLINKED = "y"


class Operation(NamedTuple):
    """One call that changed or synced a file.

    `name` is the file's name in the ledger's folder, "" for the folder itself, or
    `MARKS` for a line of the workload's own, which is no operation of the disk.
    """

    kind: Kind
    name: str
    offset: int
    size: int
    data: bytes


@dataclass(frozen=True)
class Workload:
    """Which run to record."""

    seed: int
    rounds: int
    synchronous: str = "FULL"
    acks_early: bool = False


@dataclass(frozen=True)
class Recording:
    """A run's operations, in order, and the files as they lay there at its end."""

    operations: list[Operation]
    files: dict[str, bytes]


class IncompleteRecordError(Exception):
    """The recorder has not seen all that the run did to its files."""


def record(workload: Workload, folder: Path, compiler: str = "cc") -> Recording:
    """Play the workload in `folder` (empty) and return its record.

    Raises:
        IncompleteRecordError: a file was changed past the recorder.
        subprocess.CalledProcessError: the compiler or the run failed.
    """
    root = folder.resolve() / "run"
    data = root / "data"
    data.mkdir(parents=True)
    library, entries = compile_recorder(folder, compiler), folder / "record"
    _play(workload, root, library, entries)
    operations = _read(entries.read_bytes(), root)
    files = {path.name: path.read_bytes() for path in data.iterdir()}
    return Recording(operations, {name: files[name] for name in files if _lasts(name)})


def compile_recorder(folder: Path, compiler: str) -> Path:
    """Compile the recorder into `folder`."""
    library = folder / "recorder.so"
    command = [compiler, "-O1", "-shared", "-fPIC", "-o", str(library), str(_SOURCE), "-ldl"]
    subprocess.run([*command, "-lpthread"], check=True, capture_output=True)
    return library


def _play(workload: Workload, root: Path, library: Path, entries: Path) -> None:
    argv = [sys.executable, "-m", "tests.fault.power_cuts.workload", str(root)]
    argv += ["--seed", str(workload.seed), "--rounds", str(workload.rounds)]
    argv += ["--synchronous", workload.synchronous]
    argv += ["--acks-early"] * workload.acks_early
    play(argv, root, library, entries)


def play(argv: list[str], root: Path, library: Path, entries: Path) -> None:
    """Run a command below the recorder, which watches the folder `root`."""
    environment = {
        **os.environ,
        "LD_PRELOAD": str(library),
        "EDGEWARD_RECORD_ROOT": str(root),
        "EDGEWARD_RECORD_FILE": str(entries),
    }
    subprocess.run(argv, check=True, cwd=_REPOSITORY, env=environment, timeout=_RUN_LIMIT_S)


def _read(entries: bytes, root: Path) -> list[Operation]:
    operations = []
    for path, found in iter_entries(entries):
        name = _name(path, root)
        if name is not None:
            operation = found._replace(name=name)
            check_seen(operation)
            operations.append(operation)
    return operations


def iter_entries(entries: bytes) -> Iterator[tuple[Path, Operation]]:
    """Yield what the recorder wrote: the path of a call, and the call, without a name."""
    at = 0
    while at < len(entries):
        kind, path_length, offset, size, data_length = _HEAD.unpack_from(entries, at)
        at += _HEAD.size
        path = Path(os.fsdecode(entries[at : at + path_length]))
        at += path_length
        data = entries[at : at + data_length]
        at += data_length
        yield path, Operation(Kind(chr(kind)), "", offset, size, data)


def _name(path: Path, root: Path) -> str | None:
    """Return the name that the disk's model uses; None for what no power cut leaves."""
    if not _lasts(path.name):
        return None
    if path == root / MARKS:
        return MARKS
    if path == root / "data":
        return ""
    return path.name if path.parent == root / "data" else None


def _lasts(name: str) -> bool:
    """Say whether a file may be there after a cut; SQLite's shared index is never synced."""
    return not name.endswith("-shm")


def check_seen(operation: Operation) -> None:
    """Refuse a record that cannot be whole.

    Raises:
        IncompleteRecordError: a file is written through memory.
    """
    if operation.kind is Kind.MAPPED:
        msg = f"{operation.name} is written through memory, where no write can be seen"
        raise IncompleteRecordError(msg)
