"""Prepared forms of models on disk, so that a second load skips the graph optimizer.

Owns the folder `<data_dir>/cache/ort`: entries by key, their digests, their number of bytes.
What is in an entry is the runtime's matter (`LoadOptions.prepared`). The artifact itself is
verified by whoever loads it; an entry never stands in for that.

Invariants: an entry appears in one rename, whole; it is used only while every file has the
digest it was written with; whatever is wrong with the cache, the model loads from its artifact.
What is being prepared is in a folder whose name begins with a dot and which its process holds
locked: the kernel lets go of the lock with the process, however that ends, so a folder that is
not locked is left over and is removed.
"""

import fcntl
import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from platforms.errors import PlatformError
from platforms.runtimes.base import Session

_ENTRY = "entry.json"

_log = logging.getLogger(__name__)

Loader = Callable[[Path | None], Session]
"""Loads a model; given a folder, from what is prepared there, or else prepares it there."""


class ArtifactCache:
    """Prepared models of this box; thread-safe, and shared by processes."""

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        """Keep at most `limit_bytes` below `folder`, which is made when it is needed."""
        self._folder = folder
        self._limit_bytes = limit_bytes

    def load(self, identity: object, size_bytes: int, loader: Loader) -> Session:
        """Return a session from its prepared form where there is a sound one.

        Else loads the artifact and keeps its prepared form. Blocks, reads and writes files.

        Args:
            identity: JSON-ready; all that the prepared form depends on.
            size_bytes: of the artifact: what is larger than the cache is not kept.
            loader: of the model.

        Raises:
            PlatformError: the model does not load from its artifact either.
        """
        text = json.dumps(identity, sort_keys=True)
        entry = self._folder / hashlib.sha256(text.encode()).hexdigest()
        if entry.exists():
            session = _use(entry, loader)
            if session is not None:
                return session
            shutil.rmtree(entry, ignore_errors=True)
        if size_bytes > self._limit_bytes:
            return loader(None)
        return self._prepare(entry, loader)

    def _prepare(self, entry: Path, loader: Loader) -> Session:
        try:
            staged, lock = self._stage()
        except OSError as exc:
            _log.warning("prepared models cannot be kept in %s: %s", self._folder, exc)
            return loader(None)
        try:
            session = loader(staged)
            self._keep(staged, entry)
        except PlatformError as exc:
            # The disk may be full, or the optimized graph one that cannot be written.
            shutil.rmtree(staged, ignore_errors=True)
            _log.info("a model cannot be prepared: %s", exc)
            return loader(None)
        finally:
            shutil.rmtree(staged, ignore_errors=True)
            os.close(lock)
        return session

    def _stage(self) -> tuple[Path, int]:
        """Make a folder to prepare a model in, and return it with its lock; sweep old ones."""
        self._folder.mkdir(parents=True, exist_ok=True)
        # Nobody may sweep between the making of the folder and its lock.
        with _hold(self._folder):
            for path in self._folder.glob(".*"):
                _sweep(path)
            staged = Path(tempfile.mkdtemp(prefix=".", dir=self._folder))
            lock = os.open(staged, os.O_RDONLY)
            fcntl.flock(lock, fcntl.LOCK_EX)
        return staged, lock

    def _keep(self, staged: Path, entry: Path) -> None:
        try:
            if _seal(staged):
                staged.rename(entry)
                self._prune(entry)
        except OSError as exc:
            _log.info("a prepared model is not kept: %s", exc)

    def _prune(self, kept: Path) -> None:
        """Remove the entries used longest ago, until the rest is within the limit."""
        entries = [(path.stat().st_mtime_ns, path) for path in self._folder.iterdir()]
        total = sum(_read_size(path) for _, path in entries)
        for _, path in sorted(entries):
            if total <= self._limit_bytes:
                return
            # Another process may be at work in a name with a dot.
            if path != kept and not path.name.startswith("."):
                total -= _read_size(path)
                shutil.rmtree(path, ignore_errors=True)


@contextmanager
def _hold(folder: Path) -> Iterator[None]:
    """Hold a folder's lock for the length of the block; waits for whoever holds it."""
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def _sweep(staged: Path) -> None:
    """Remove what a process that is gone was preparing; leave what a living one holds."""
    with suppress(OSError):
        lock = os.open(staged, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(staged, ignore_errors=True)
            _log.info("left by a process that is gone, and removed: %s", staged)
        finally:
            os.close(lock)


def _use(entry: Path, loader: Loader) -> Session | None:
    """Return a session from an entry, or None where it is damaged or refused."""
    try:
        sealed = json.loads((entry / _ENTRY).read_text(encoding="utf-8"))
        if sealed != _compute_digests(entry):
            _log.warning("the prepared model %s is damaged; it is made again", entry.name)
            return None
        session = loader(entry)
        os.utime(entry)
    except (OSError, ValueError, PlatformError) as exc:
        _log.warning("the prepared model %s cannot be used: %s", entry.name, exc)
        return None
    return session


def _seal(folder: Path) -> bool:
    """Write the digests of what was prepared; say whether anything was."""
    digests = _compute_digests(folder)
    if digests:
        (folder / _ENTRY).write_text(json.dumps(digests), encoding="utf-8")
    return bool(digests)


def _compute_digests(folder: Path) -> dict[str, str]:
    digests = {}
    for path in sorted(folder.iterdir()):
        if path.name != _ENTRY:
            with path.open("rb") as file:
                digests[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return digests


def _read_size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
