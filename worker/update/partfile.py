"""A file that is on its way: its bytes, which of them are there, and whose it is.

    <models>/.fetch/<sha256>.part       the bytes, in place, with holes
                    <sha256>.journal    which ranges are there
    <models>/.blobs/<sha256>            the finished file, by one rename

The journal's first line says what was flushed to the disk; each further line is one range
written since, in this boot. A killed process therefore loses nothing that it had written,
and a power cut no more than what came since the last flush.

Invariants: one process holds a part file (a lock on it); the journal never names a range
before its bytes are written, and its first line none before they are flushed; only
`finish` makes the final name, and only with the right size and sha256. What the journal
says is still not trusted: the sha256 decides.

Never in `.blobs`: there, `ModelRepository` writes part files of its own by the same digest, and
removes files that no version links.
"""

import fcntl
import hashlib
import json
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from agent.clock import SystemClock
from agent.fileio import fsync_dir, make_folders, write_atomic
from agent.release import ReleaseFile
from worker.errors import FetchBusyError

PARTS_DIR = ".fetch"
BLOBS_DIR = ".blobs"
"""The content-addressed store of `agent.repository`."""
PART_SUFFIX = ".part"
JOURNAL_SUFFIX = ".journal"
_SCHEMA = "edgeward.part/v1"
_JOURNAL_MAX_BYTES = 8 << 20

Span = tuple[int, int]
"""Start and end (exclusive) of bytes in a file."""


class SpanSet:
    """Which bytes of a file are there: spans, sorted, apart from each other."""

    def __init__(self, spans: Iterable[Span] = ()) -> None:
        self._spans: list[Span] = []
        for start, end in spans:
            self.add(start, end)

    def add(self, start: int, end: int) -> None:
        """Add a span; it may touch or overlap others."""
        if end <= start:
            return
        apart = []
        for span in self._spans:
            if span[1] < start or span[0] > end:
                apart.append(span)
            else:
                start, end = min(start, span[0]), max(end, span[1])
        self._spans = sorted([*apart, (start, end)])

    def find_gaps(self, size_bytes: int) -> list[Span]:
        """Return what of a file of that size is not there."""
        gaps, at = [], 0
        for start, end in self._spans:
            if start > at:
                gaps.append((at, start))
            at = end
        return [*gaps, (at, size_bytes)] if at < size_bytes else gaps

    def clip(self, size_bytes: int) -> "SpanSet":
        """Return what of it lies below that size."""
        return SpanSet((start, min(end, size_bytes)) for start, end in self._spans)

    @property
    def spans(self) -> list[Span]:
        """Return the spans, in order."""
        return list(self._spans)

    @property
    def size_bytes(self) -> int:
        """How many bytes are there."""
        return sum(end - start for start, end in self._spans)


class PartFile:
    """The part file of one blob; made by `open_part`, valid inside it."""

    def __init__(self, blob: ReleaseFile, path: Path, fd: int) -> None:
        self.blob = blob
        self._path = path
        self._fd = fd
        self._journal_path = path.with_suffix(JOURNAL_SUFFIX)
        self._boot = SystemClock().boot_id()
        if os.fstat(fd).st_size > blob.size_bytes:
            os.ftruncate(fd, blob.size_bytes)
        _remove_torn(self._journal_path)
        self.is_planned = False
        """A delta has been looked for already; what it found has been copied."""
        self.held = self._read_journal()
        """What is there."""
        self.is_mixed = bool(self.held.spans)
        """It has bytes that were not fetched just now: of another call, or of an old file."""
        self.unsynced_bytes = 0
        self._is_gone = False
        self._journal = self._journal_path.open("ab", buffering=0)
        self.sync()

    @property
    def gaps(self) -> list[Span]:
        """What is still missing."""
        return self.held.find_gaps(self.blob.size_bytes)

    def write(self, offset: int, data: bytes) -> None:
        """Write bytes where they belong.

        Raises:
            OSError: the disk is full or broken; what was written before is kept.
        """
        view = memoryview(data)
        at = offset
        while view:
            count = os.pwrite(self._fd, view, at)
            view, at = view[count:], at + count
        self.held.add(offset, at)
        self.unsynced_bytes += len(data)
        # One write of a whole line; after a torn one the reader stops.
        self._journal.write(f"{offset} {at}\n".encode())

    def sync(self) -> None:
        """Flush the bytes, then the journal that names them."""
        os.fsync(self._fd)
        head = {
            "schema": _SCHEMA,
            "size_bytes": self.blob.size_bytes,
            "boot": self._boot,
            "planned": self.is_planned,
            "synced": self.held.spans,
        }
        self._journal.close()
        write_atomic(self._journal_path, json.dumps(head) + "\n")
        self._journal = self._journal_path.open("ab", buffering=0)
        self.unsynced_bytes = 0

    def reset(self) -> None:
        """Forget all bytes; begin again from zero, without a delta."""
        self.held = SpanSet()
        self.is_planned, self.is_mixed = True, False
        os.ftruncate(self._fd, 0)
        self.sync()

    def finish(self, final: Path) -> bool:
        """Give it its final name, durably, if size and sha256 are the blob's; say whether they are.

        Reads the whole file.
        """
        os.fsync(self._fd)
        if not self._is_right():
            return False
        self._path.replace(final)
        self._is_gone = True
        fsync_dir(final.parent)
        self._journal_path.unlink(missing_ok=True)
        return True

    def _is_right(self) -> bool:
        if os.fstat(self._fd).st_size != self.blob.size_bytes:
            return False
        with open(os.dup(self._fd), "rb") as file:  # noqa: PTH123 (a descriptor, not a path)
            file.seek(0)
            return hashlib.file_digest(file, "sha256").hexdigest() == self.blob.sha256

    def discard(self) -> None:
        """Remove what is there of it."""
        self._is_gone = True
        self._path.unlink(missing_ok=True)
        self._journal_path.unlink(missing_ok=True)

    def close(self) -> None:
        """Let go of it; what is there stays, and is flushed where the disk allows."""
        if not self._is_gone:
            with suppress(OSError):
                self.sync()
        self._journal.close()
        os.close(self._fd)

    def _read_journal(self) -> SpanSet:
        """Return what the journal vouches for; nothing where it cannot be understood."""
        with suppress(OSError, ValueError, TypeError, KeyError, RecursionError):
            if self._journal_path.stat().st_size > _JOURNAL_MAX_BYTES:
                return SpanSet()
            first, _, rest = self._journal_path.read_text("ascii").partition("\n")
            head: dict[str, Any] = json.loads(first)
            if (head["schema"], head["size_bytes"]) != (_SCHEMA, self.blob.size_bytes):
                return SpanSet()
            spans = SpanSet((int(start), int(end)) for start, end in head["synced"])
            if head["boot"] == self._boot:
                for start, end in _parse_lines(rest):
                    spans.add(start, end)
            self.is_planned = bool(head["planned"])
            room = min(self.blob.size_bytes, os.fstat(self._fd).st_size)
            return SpanSet((max(0, start), end) for start, end in spans.clip(room).spans)
        return SpanSet()


def _parse_lines(text: str) -> Iterator[Span]:
    for line in text.splitlines(keepends=True):
        start, _, end = line.partition(" ")
        if not (line.endswith("\n") and start.isdecimal() and end.rstrip("\n").isdecimal()):
            return
        yield int(start), int(end)


@contextmanager
def open_part(models: Path, blob: ReleaseFile) -> Iterator[PartFile]:
    """Hold the part file of a blob; created where there is none. Closed, not removed, at the end.

    Raises:
        FetchBusyError: another process holds it.
        OSError: it cannot be created.
    """
    folder = models / PARTS_DIR
    make_folders(folder)
    path = folder / f"{blob.sha256}{PART_SUFFIX}"
    fd = _open(path)
    if os.fstat(fd).st_nlink > 1:
        # A power cut in the rename may leave both names: what is written here would be written
        # to a blob that versions link.
        os.close(fd)
        path.unlink()
        fd = _open(path)
    try:
        _lock(fd, path)
        part = PartFile(blob, path, fd)
    except BaseException:
        os.close(fd)
        raise
    try:
        yield part
    finally:
        part.close()


def _open(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)


def _lock(fd: int, path: Path) -> None:
    msg = f"another process is fetching {path.name.removesuffix(PART_SUFFIX)}"
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as exc:
        raise FetchBusyError(msg) from exc
    # The holder before may have finished it between our open and our lock.
    if os.fstat(fd).st_nlink == 0 or not _is_same(fd, path):
        raise FetchBusyError(msg)


def _is_same(fd: int, path: Path) -> bool:
    with suppress(OSError):
        return os.path.samestat(os.fstat(fd), path.lstat())
    return False


def measure_part(models: Path, digest: str) -> int:
    """Return the bytes that a blob's part file takes on the disk; 0 without one."""
    with suppress(OSError):
        return (models / PARTS_DIR / f"{digest}{PART_SUFFIX}").lstat().st_blocks * 512
    return 0


def remove_parts(models: Path, keep: Iterable[str] = (), min_age_s: float = 0.0) -> int:
    """Remove the part files that nobody holds, but for some; return the bytes that were freed.

    Args:
        models: the repository's folder.
        keep: digests of blobs that are still wanted.
        min_age_s: those that were written since stay: their download may go on.
    """
    folder, kept, freed = models / PARTS_DIR, set(keep), 0
    for path in sorted(folder.glob(f"[0-9a-f]*{PART_SUFFIX}")):
        if path.stem in kept:
            continue
        with suppress(OSError, FetchBusyError):
            if time.time() - path.lstat().st_mtime < min_age_s:
                continue
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
            try:
                _lock(fd, path)
                freed += os.fstat(fd).st_blocks * 512
                path.unlink()
            finally:
                os.close(fd)
    # A journal is made after its part file, so one without it has lost it.
    for path in sorted(folder.glob(f"[0-9a-f]*{JOURNAL_SUFFIX}")):
        if not path.with_suffix(PART_SUFFIX).exists():
            path.unlink(missing_ok=True)
            _remove_torn(path)
    return freed


def _remove_torn(journal: Path) -> None:
    """Remove what a crash left of writing a journal; only while nobody else can write it."""
    for path in journal.parent.glob(f".{journal.name}.*{PART_SUFFIX}"):
        path.unlink(missing_ok=True)
