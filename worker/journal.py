"""The run journal: what a worker process was at, readable after its sudden death.

One small file a process, in a folder a slot, mapped into memory: an entry for
each thread says which task it runs and which of its jobs are at work just now.
Written without a flush: it must outlive the process, not the machine. Beside
it lies the file that `faulthandler` writes a trace to when a signal kills the
process. Here both are written and read; what follows from them is decided in
`worker.crashes`.

Invariants: the file has its full size from the start (a mapping onto a full
disk would be a bus error) and never grows; a living process holds its lock, so
whoever gets the lock reads a dead one's; an entry that was torn counts as none.
"""

import fcntl
import json
import mmap
import os
import struct
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from worker.oom import OomCount

JOURNAL_SUFFIX = ".journal"
TRACE_SUFFIX = ".trace"
_MAGIC = b"edgeward-journal-1\n"
_HEADER_BYTES = 4096
_OOM_AT = 2048
_OOM = struct.Struct("<qqq")
# Room for the 256 jobs that a task may carry: each is named in about 34 bytes.
_ENTRY_BYTES = 16384
_HEAD = struct.Struct("<IQ")
_LENGTH = struct.Struct("<I")
_BITS_AT, _BITS_BYTES = 16, 32
_TEXT_AT = 64


@dataclass(frozen=True, slots=True)
class RunRecord:
    """What a dead process was at, in one of its threads."""

    thread: int
    """As `threading.get_ident` has it, and `faulthandler`'s trace."""
    task: str
    model: str
    version: str | None
    """Number of the version's folder."""
    reply: str
    jobs: tuple[tuple[str, int], ...]
    """Ids and attempts of the jobs that were at work."""


@dataclass(frozen=True, slots=True)
class DeadJournal:
    """What a dead process left."""

    path: Path
    boot: str
    """Boot of the machine that it ran in; empty where the file cannot be read."""
    oom: OomCount
    records: tuple[RunRecord, ...]
    trace: str
    """What `faulthandler` wrote, or nothing."""

    def remove(self) -> None:
        """Remove the files, the journal last: without it nobody looks for the trace."""
        _trace_path(self.path).unlink(missing_ok=True)
        self.path.unlink(missing_ok=True)


class JournalEntry:
    """One thread's part of the journal. Only that thread writes it."""

    def __init__(self, memory: mmap.mmap, at: int) -> None:
        self._memory = memory
        self._at = at
        self._bits: dict[str, int] = {}

    def open(self, task: dict[str, Any], version: str | None) -> None:
        """Say which task runs in this thread; none of its jobs is at work yet."""
        jobs = [(item["id"], item["attempt"]) for item in task["jobs"]]
        head = {name: task[name] for name in ("task", "model", "reply")}
        text = json.dumps({**head, "version": version, "jobs": jobs}).encode()
        self.close()
        if len(text) > _ENTRY_BYTES - _TEXT_AT or len(jobs) > 8 * _BITS_BYTES:
            return
        self._bits = {job_id: 1 << index for index, (job_id, _) in enumerate(jobs)}
        start = self._at + _TEXT_AT
        self._memory[start : start + len(text)] = text
        # The length comes last: until then the entry counts as none.
        _HEAD.pack_into(self._memory, self._at, 0, threading.get_ident())
        _LENGTH.pack_into(self._memory, self._at, len(text))

    def mark(self, job_ids: Sequence[str]) -> None:
        """Say which jobs are at work now; before `open` and after `close` it does nothing."""
        if self._bits:
            bits = sum(self._bits.get(job_id, 0) for job_id in job_ids)
            start = self._at + _BITS_AT
            self._memory[start : start + _BITS_BYTES] = bits.to_bytes(_BITS_BYTES, "little")

    def close(self) -> None:
        """Say that the thread runs nothing."""
        _LENGTH.pack_into(self._memory, self._at, 0)
        self.mark(())
        self._bits = {}


class Journal:
    """The journal of this process.

    Args:
        folder: the slot's folder, see `slot_folder`.
        name: this process's own name, unique in the folder.
        boot: the machine's boot id.
        entries: how many threads run tasks.

    Raises:
        OSError: it cannot be written there.
    """

    def __init__(self, folder: Path, name: str, boot: str, entries: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"{name}{JOURNAL_SUFFIX}"
        size = _HEADER_BYTES + entries * _ENTRY_BYTES
        with self.path.open("x+b") as file:
            header = _MAGIC + json.dumps({"boot": boot, "pid": os.getpid()}).encode() + b"\n"
            # Real zeros, not a hole: the disk must have room for every page now.
            file.write(header.ljust(size, b"\0"))
            file.flush()
            # A descriptor of its own: the lock lasts as long as the process.
            self._lock_fd = os.dup(file.fileno())
            os.set_inheritable(self._lock_fd, False)
            fcntl.flock(self._lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._memory = mmap.mmap(file.fileno(), size)
        self.save_oom(OomCount())
        self.trace = _trace_path(self.path).open("wb", buffering=0)
        self._free = deque(
            JournalEntry(self._memory, at) for at in range(_HEADER_BYTES, size, _ENTRY_BYTES)
        )

    @contextmanager
    def take(self) -> Iterator[JournalEntry | None]:
        """Give the calling thread an entry for the block; None where more run than was said."""
        try:
            entry = self._free.popleft()
        except IndexError:
            yield None
            return
        try:
            yield entry
        finally:
            entry.close()
            self._free.append(entry)

    def save_oom(self, count: OomCount) -> None:
        """Keep the kernel's out-of-memory counters as they are while this process lives."""
        _OOM.pack_into(self._memory, _OOM_AT, count.kills, count.group, count.group_kills)

    def remove(self) -> None:
        """Close and remove the files of this process, which ends as it means to."""
        self.trace.close()
        self.path.unlink(missing_ok=True)
        _trace_path(self.path).unlink(missing_ok=True)


def slot_folder(runtime_dir: Path, slot: str) -> Path:
    """Return the folder of a slot's journals."""
    return runtime_dir / "workers" / quote(slot, safe="")


@contextmanager
def claim_journal(path: Path) -> Iterator[DeadJournal | None]:
    """Read a journal whose process is dead, and keep others off it for the block.

    Gives None where the process lives, another reader is at it, or it is gone.
    """
    try:
        file = path.open("rb")
    except OSError:
        yield None
        return
    with file:
        try:
            fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield None
            return
        yield _parse(path, file.read())


def _parse(path: Path, data: bytes) -> DeadJournal:
    oom = OomCount()
    boot = ""
    records: list[RunRecord] = []
    if data.startswith(_MAGIC) and len(data) >= _HEADER_BYTES:
        try:
            boot = str(json.loads(data[len(_MAGIC) :].split(b"\n", 1)[0])["boot"])
        except (ValueError, KeyError, TypeError):
            boot = ""
        oom = OomCount(*_OOM.unpack_from(data, _OOM_AT))
        for at in range(_HEADER_BYTES, len(data) - _ENTRY_BYTES + 1, _ENTRY_BYTES):
            record = _parse_entry(data[at : at + _ENTRY_BYTES])
            if record is not None:
                records.append(record)
    return DeadJournal(path, boot, oom, tuple(records), _read_trace(path))


def _parse_entry(data: bytes) -> RunRecord | None:
    """Return what an entry says, or None where nothing was at work, or it is torn."""
    length, thread = _HEAD.unpack_from(data)
    bits = int.from_bytes(data[_BITS_AT : _BITS_AT + _BITS_BYTES], "little")
    if not length or not bits:
        return None
    try:
        text = json.loads(data[_TEXT_AT : _TEXT_AT + length])
        jobs = tuple(
            (str(job_id), int(attempt))
            for index, (job_id, attempt) in enumerate(text["jobs"])
            if bits >> index & 1
        )
        names = (text["task"], text["model"], text["version"], text["reply"])
    except (ValueError, KeyError, TypeError):
        return None
    return RunRecord(thread, *names, jobs)


def _read_trace(journal: Path) -> str:
    try:
        return _trace_path(journal).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _trace_path(journal: Path) -> Path:
    return journal.with_suffix(TRACE_SUFFIX)
