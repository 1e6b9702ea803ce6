"""Fetches blobs into the content-addressed store: whole, in parts, or by difference.

Owns when a source is asked, what for, and when it is given up. What of a file has come is
`worker.update.partfile`'s, what an answer must look like `worker.update.transport`'s, what
need not be fetched `worker.update.chunks`'s.

    stored? ──yes──▶ done                          (verified by sha256, also then)
       │ no
    room for it and the reserve? ──no──▶ NoRoomError, nothing written
       │ yes
    copy what old blobs have ─▶ fetch the gaps ─▶ sha256 right? ──yes──▶ rename
                                  ▲                  │ no
                                  └── once, from zero, if any byte was not fetched just now

Invariants: nothing gets its final name but what has the size and sha256 of the release; a
source gives no more bytes than it was asked for; whatever breaks, the next call goes on from what
has come; no wait is without a bound, and each looks for a cancel.
"""

import errno
import logging
import os
import random
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from agent.fileio import make_folders
from agent.manifest import compute_sha256
from agent.release import BLOBS_DIR, CHUNKS_DIR, ReleaseDocument, ReleaseFile
from worker.errors import (
    ChunkIndexError,
    FetchCanceledError,
    FetchError,
    NoRoomError,
    SourceAnswerError,
    SourceMissingError,
    SourceUnavailableError,
    WrongHashError,
    WrongLengthError,
)
from worker.update import partfile
from worker.update.chunks import (
    MIN_INDEXED_BYTES,
    ChunkIndex,
    Copy,
    limit_index_bytes,
    plan_delta,
    read_chunk_index,
)
from worker.update.partfile import PartFile
from worker.update.throttle import Throttle
from worker.update.transport import BlobSource, BlobStream

Progress = Callable[[int, int, int], None]
"""Gets bytes that are there, bytes in all, and bytes fetched so far. Called for each piece."""

_log = logging.getLogger(__name__)
_PIECE_BYTES = 64 << 10
_COPY_BYTES = 1 << 20
_SYNC_BYTES = 4 << 20
_SYNC_S = 10.0
_LEAST_PROGRESS_BYTES = 16 << 10
"""An attempt that brought less counts as failed: a byte a connection is no download."""
_WAIT_SLICE_S = 0.5
"""How soon a cancel is seen during a wait."""
_NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


@dataclass(frozen=True, slots=True)
class FetchLimits:
    """What a download may use."""

    reserve_bytes: int = 64 << 20
    """Stays free on the store's disk."""
    bytes_per_s: int | None = None
    """Bandwidth, above 0; None for no limit."""
    retries: int = 8
    """Attempts in a row that bring nothing; each with progress begins the count again."""
    first_wait_s: float = 1.0
    max_wait_s: float = 60.0
    """Waits are drawn from zero to a bound that doubles from the first to this (full jitter)."""


@dataclass(frozen=True, slots=True)
class FetchReport:
    """What fetching a release took."""

    files: dict[str, Path]
    """Where each wanted file lies in the store, by its path in the release."""
    bytes_total: int
    """Sizes of the wanted blobs, each counted once."""
    bytes_fetched: int
    """What came from the source: blobs, indexes, and what had to be fetched again."""
    duration_s: float

    @property
    def bytes_reused(self) -> int:
        """What was in the store, came from old blobs, or had been fetched before."""
        return max(0, self.bytes_total - self.bytes_fetched)


class _Run:
    """One call: whom to tell, whom to ask, how fast, and the sums over its files."""

    def __init__(
        self,
        total: int,
        progress: Progress | None,
        is_canceled: Callable[[], bool] | None,
        pause: Callable[[float], None],
    ) -> None:
        self.total = total
        self.done = 0
        """Bytes of the files that are finished."""
        self.fetched = 0
        self._progress = progress
        self._is_canceled = is_canceled
        self._pause = pause

    def check_canceled(self) -> None:
        if self._is_canceled is not None and self._is_canceled():
            msg = "the download was canceled; what has come is kept"
            raise FetchCanceledError(msg)

    def tell(self, held: int = 0) -> None:
        if self._progress is not None:
            self._progress(self.done + held, self.total, self.fetched)

    def wait(self, wait_s: float) -> None:
        """Wait, in slices between which a cancel is seen."""
        while wait_s > 0:
            self.check_canceled()
            self._pause(min(_WAIT_SLICE_S, wait_s))
            wait_s -= _WAIT_SLICE_S


class BlobFetcher:
    """Fetches blobs of releases from one source. One thread at a time.

    Args:
        models: the model repository's folder; blobs go to its `.blobs`.
        source: where they come from.
        limits: what it may use.
        clock: seconds, monotonic.
        pause: waits for so many seconds.
        draw: a random number from 0 to 1.
    """

    def __init__(
        self,
        models: Path,
        source: BlobSource,
        limits: FetchLimits | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
        pause: Callable[[float], None] = time.sleep,
        draw: Callable[[], float] = random.random,
    ) -> None:
        self._models = models
        self._source = source
        self._limits = limits or FetchLimits()
        self._clock = clock
        self._pause = pause
        self._draw = draw
        self._throttle = Throttle(self._limits.bytes_per_s, clock)
        self._synced_at = clock()

    def fetch(
        self,
        blob: ReleaseFile,
        old_files: Sequence[Path] = (),
        *,
        progress: Progress | None = None,
        is_canceled: Callable[[], bool] | None = None,
    ) -> Path:
        """Fetch one blob, unless it is in the store, and return its path there.

        Blocks for as long as the source gives bytes; where it stops, until the retries are used up.

        Args:
            blob: what to fetch; its `path` does not matter.
            old_files: blobs that may have parts of it, the likeliest first.
            progress: told after each piece.
            is_canceled: asked before each piece, and during waits.

        Raises:
            SourceUnavailableError: the source does not answer, or no longer; what has come stays.
            SourceAnswerError: it answers something else, such as a redirect.
            WrongLengthError, WrongHashError: what it has is not this blob.
            NoRoomError: the disk has not the room; before the first byte, nothing was written.
            FetchBusyError: another process is fetching the same blob.
            FetchCanceledError: `is_canceled` said so.
            FetchError: the store cannot be written.
        """
        run = _Run(blob.size_bytes, progress, is_canceled, self._pause)
        if not self._is_stored(blob):
            self._check_room([blob])
            self._fetch(blob, old_files, run)
        run.done = run.total
        run.tell()
        return self._get_path(blob)

    def fetch_release(
        self,
        document: ReleaseDocument,
        wanted_paths: Collection[str],
        old_files: Sequence[Path] = (),
        *,
        progress: Progress | None = None,
        is_canceled: Callable[[], bool] | None = None,
    ) -> FetchReport:
        """Fetch the files of a release that are wanted and not in the store.

        Args:
            document: the release, verified by the caller.
            wanted_paths: of its files.
            old_files: as for `fetch`.
            progress: told over all files together.
            is_canceled: as for `fetch`.

        Raises:
            ReleaseError: the release has no file of a wanted path.
            FetchError: as for `fetch`; blobs that are complete stay in the store.
        """
        started = self._clock()
        files = {path: document.get_file(path) for path in wanted_paths}
        blobs = {(file.sha256, file.size_bytes): file for file in files.values()}.values()
        total = sum(blob.size_bytes for blob in blobs)
        run = _Run(total, progress, is_canceled, self._pause)
        missing = [blob for blob in blobs if not self._is_stored(blob)]
        self._check_room(missing)
        run.done = run.total - sum(blob.size_bytes for blob in missing)
        run.tell()
        for blob in missing:
            self._fetch(blob, old_files, run)
            run.done += blob.size_bytes
            run.tell()
        return FetchReport(
            {path: self._get_path(file) for path, file in files.items()},
            run.total,
            run.fetched,
            self._clock() - started,
        )

    # --- one blob ---------------------------------------------------------------------------

    def _get_path(self, blob: ReleaseFile) -> Path:
        return self._models / partfile.BLOBS_DIR / blob.sha256

    def _is_stored(self, blob: ReleaseFile) -> bool:
        """Say whether the store has it, and undamaged. Reads the file."""
        path = self._get_path(blob)
        try:
            found = path.lstat()
            is_whole = not path.is_symlink() and found.st_size == blob.size_bytes
            return is_whole and compute_sha256(path) == blob.sha256
        except OSError:
            return False

    def _fetch(self, blob: ReleaseFile, old_files: Sequence[Path], run: _Run) -> None:
        final = self._get_path(blob)
        with _disk_errors(self._models):
            make_folders(final.parent)
            with partfile.open_part(self._models, blob) as part:
                # Another process may have finished it since the caller looked.
                if self._is_stored(blob):
                    part.discard()
                    return
                self._complete(part, old_files, final, run)

    def _complete(self, part: PartFile, old_files: Sequence[Path], final: Path, run: _Run) -> None:
        if old_files and not part.is_planned:
            self._copy_old(part, old_files, run)
        self._fill(part, run)
        if part.finish(final):
            return
        if part.is_mixed:
            _log.warning("%s: resumed or copied bytes were wrong; fetched whole", part.blob.sha256)
            part.reset()
            self._fill(part, run)
            if part.finish(final):
                return
        part.discard()
        msg = (
            f"blob {part.blob.sha256} was fetched whole and has another sha256; it was removed: "
            "what the source serves is not what was released"
        )
        raise WrongHashError(msg)

    def _fill(self, part: PartFile, run: _Run) -> None:
        """Fetch what is missing."""
        path = f"{BLOBS_DIR}/{part.blob.sha256}"

        def fetch_gaps() -> None:
            while part.gaps:
                span = part.gaps[0]
                with self._source.open(path, span, part.blob.size_bytes) as stream:
                    self._drain(stream, span[1], part, run)

        self._insist(fetch_gaps, lambda: part.held.size_bytes, run)

    def _drain(self, stream: BlobStream, wanted_end: int, part: PartFile, run: _Run) -> None:
        """Write what a stream gives; no byte more than belongs there."""
        at = stream.start
        end = part.blob.size_bytes if stream.end is None else stream.end
        while at < end:
            data = self._read(stream, end - at, run)
            if not data:
                break
            part.write(at, data)
            at += len(data)
            run.tell(part.held.size_bytes)
            self._sync_if_due(part)
        if at < wanted_end:
            msg = f"the source stopped at byte {at} of {wanted_end} of blob {part.blob.sha256}"
            raise SourceUnavailableError(msg)
        if stream.end is None and stream.read(1):
            part.discard()
            msg = f"the source sends more than the {end} bytes of blob {part.blob.sha256}"
            raise WrongLengthError(msg)

    def _read(self, stream: BlobStream, largest: int, run: _Run) -> bytes:
        run.check_canceled()
        data = stream.read(min(self._throttle.choose_piece(_PIECE_BYTES), largest))
        run.fetched += len(data)
        run.wait(self._throttle.take(len(data)))
        return data

    def _sync_if_due(self, part: PartFile) -> None:
        """Flush now and then, and look whether the reserve is still there."""
        now = self._clock()
        if part.unsynced_bytes < _SYNC_BYTES and now - self._synced_at < _SYNC_S:
            return
        self._synced_at = now
        part.sync()
        if _measure_free(self._models) < self._limits.reserve_bytes:
            msg = (
                f"the disk of {self._models} has less than the reserve of "
                f"{self._limits.reserve_bytes} bytes free: free space; what has come is kept"
            )
            raise NoRoomError(msg)

    def _insist(self, attempt: Callable[[], None], measure: Callable[[], int], run: _Run) -> None:
        """Try again while the source breaks off, up to the bound of attempts that bring nothing.

        Args:
            attempt: what to try.
            measure: how much is there, in bytes.
            run: the call that it belongs to.
        """
        failures = 0
        while True:
            before = measure()
            try:
                attempt()
            except SourceMissingError:
                raise
            except SourceUnavailableError as exc:
                has_progress = measure() - before >= _LEAST_PROGRESS_BYTES
                failures = 0 if has_progress else failures + 1
                if failures > self._limits.retries:
                    raise
                _log.info("fetching goes on after a failure (%d in a row): %s", failures, exc)
            else:
                return
            bound_s = self._limits.first_wait_s * 2.0 ** min(failures, 30)
            run.wait(self._draw() * min(self._limits.max_wait_s, bound_s))

    def _check_room(self, blobs: Sequence[ReleaseFile]) -> None:
        held = sum(
            min(blob.size_bytes, partfile.measure_part(self._models, blob.sha256)) for blob in blobs
        )
        need = sum(blob.size_bytes for blob in blobs) - held
        free = _measure_free(self._models)
        if blobs and free < need + self._limits.reserve_bytes:
            msg = (
                f"the disk of {self._models} has {free} bytes free; {need} are needed and "
                f"{self._limits.reserve_bytes} are to stay free: free space"
            )
            raise NoRoomError(msg)

    # --- by difference ----------------------------------------------------------------------

    def _copy_old(self, part: PartFile, old_files: Sequence[Path], run: _Run) -> None:
        """Copy from old blobs what they have of this one, as far as its index tells."""
        missing_bytes = sum(end - start for start, end in part.gaps)
        index = self._fetch_index(part.blob, run) if missing_bytes >= MIN_INDEXED_BYTES else None
        if index is not None:
            for copy in plan_delta(index, old_files).copies:
                self._copy(part, old_files[copy.source], copy, run)
                part.is_mixed = True
        part.is_planned = True
        part.sync()

    def _copy(self, part: PartFile, old: Path, copy: Copy, run: _Run) -> None:
        done = 0
        while done < copy.length:
            run.check_canceled()
            data = _read_old(old, copy.source_offset + done, min(_COPY_BYTES, copy.length - done))
            if not data:
                return
            part.write(copy.offset + done, data)
            done += len(data)
            run.tell(part.held.size_bytes)
            self._sync_if_due(part)

    def _fetch_index(self, blob: ReleaseFile, run: _Run) -> ChunkIndex | None:
        """Return the blob's index; None where there is none that can be used."""
        limit = limit_index_bytes(blob.size_bytes)
        text = bytearray()

        def fetch_text() -> None:
            text.clear()
            with self._source.open(f"{CHUNKS_DIR}/{blob.sha256}.json") as stream:
                while len(text) <= limit and (data := self._read(stream, _PIECE_BYTES, run)):
                    text.extend(data)

        try:
            self._insist(fetch_text, lambda: 0, run)
            return read_chunk_index(bytes(text), blob.size_bytes)
        except SourceMissingError:
            return None
        except (ChunkIndexError, SourceAnswerError) as exc:
            _log.warning("blob %s is fetched whole: %s", blob.sha256, exc)
            return None


def _read_old(path: Path, offset: int, count: int) -> bytes:
    """Return bytes of an old file; none where it cannot be read: then they are fetched."""
    try:
        with path.open("rb") as file:
            file.seek(offset)
            return file.read(count)
    except OSError:
        return b""


def _measure_free(folder: Path) -> int:
    """Return the free bytes of the disk that a folder is on, or would be."""
    while not folder.exists():
        folder = folder.parent
    found = os.statvfs(folder)
    return found.f_bavail * found.f_frsize


@contextmanager
def _disk_errors(models: Path) -> Iterator[None]:
    """Word what the store's disk refuses."""
    try:
        yield
    except OSError as exc:
        if exc.errno in _NO_ROOM:
            msg = f"the disk of {models} is full: free space; what has come is kept"
            raise NoRoomError(msg) from exc
        msg = f"{models} cannot be written: {exc.strerror or exc}"
        raise FetchError(msg) from exc
