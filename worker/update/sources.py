"""Where releases come from: a web server, a folder, or one bundle file from a stick.

Owns reading a small file whole, and what a bundle may hold. How a server's answer must
look, and opening a file of a folder, is `worker.update.transport`'s. Writes nothing.

Invariants: nothing is unpacked; of a bundle only plain files are read, whose names are
those of a release repository and whose sizes have a bound, and one that holds anything
else is refused whole. What is read is still a stranger's until `worker.update.trust` or
a sha256 has verified it.
"""

import os
import re
import stat
import tarfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Protocol

from agent.release import BUNDLE_SUFFIX, RELEASE_MAX_BYTES
from worker.errors import (
    BundleError,
    SourceMissingError,
    SourceUnavailableError,
    WrongLengthError,
)
from worker.update.chunks import MAX_INDEX_BYTES
from worker.update.transport import BlobSource, BlobStream, FolderSource, HttpSource

METADATA_MAX_BYTES = 5_000_000
"""Of one metadata file. Source: tuf 7, `UpdaterConfig.targets_max_length`."""
MAX_MEMBERS = 50_000
"""Of a bundle: a release names 10,000 files at most, each with a list of chunks."""

_PIECE_BYTES = 64 << 10
_DEADLINE_S = 120.0
"""For one small file; a server that sends a byte now and then must not hold the lane for ever."""
_NAME = r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}"
_MEMBERS: tuple[tuple[re.Pattern[str], int | None], ...] = (
    (re.compile(r"metadata/[A-Za-z0-9_-][A-Za-z0-9_.-]{0,99}\.json"), METADATA_MAX_BYTES),
    (re.compile(rf"targets/{_NAME}/{_NAME}/[0-9a-f]{{64}}\.release\.json"), RELEASE_MAX_BYTES),
    (re.compile(r"chunks/[0-9a-f]{64}\.json"), MAX_INDEX_BYTES),
    (re.compile(r"blobs/[0-9a-f]{64}"), None),
)
"""What a bundle may hold, and how large it may be; a blob may be as large as the bundle."""


class ReleaseSource(BlobSource, Protocol):
    """A release repository to read from, whole files or parts of them. One thread at a time."""

    def read(self, path: str, max_bytes: int) -> bytes:
        """Return a small file of the repository.

        Raises:
            SourceMissingError: there is no such file.
            SourceUnavailableError: the source does not answer, or not in time.
            WrongLengthError: the file is longer than `max_bytes`.
            FetchError: the path or the answer may not be used.
        """
        ...


class _Whole:
    """Reads whole files of a source that opens them."""

    def read(self: BlobSource, path: str, max_bytes: int) -> bytes:
        """Return a small file; see `ReleaseSource.read`."""
        deadline_s = time.monotonic() + _DEADLINE_S
        with self.open(path) as stream:
            if stream.end is not None and stream.end > max_bytes:
                raise WrongLengthError(_word_long(path, max_bytes))
            data = bytearray()
            while piece := stream.read(min(_PIECE_BYTES, max_bytes + 1 - len(data))):
                data += piece
                if len(data) > max_bytes:
                    raise WrongLengthError(_word_long(path, max_bytes))
                if time.monotonic() > deadline_s:
                    msg = f"{path}: the source sends too slowly; given up after {_DEADLINE_S:.0f} s"
                    raise SourceUnavailableError(msg)
            if stream.end is not None and len(data) < stream.end:
                msg = f"{path}: the source stopped after {len(data)} of {stream.end} bytes"
                raise SourceUnavailableError(msg)
        return bytes(data)


class HttpReleaseSource(_Whole, HttpSource):
    """A release repository on a web server."""


class FolderReleaseSource(_Whole, FolderSource):
    """A release repository in a folder of this box."""


class BundleSource(_Whole):
    """A bundle file: one release, its metadata and its blobs in an uncompressed tar.

    Args:
        path: of the file. It is read in place, and opened anew each time.

    Raises:
        BundleError: it holds something that no bundle holds, or is torn.
        SourceMissingError: there is no such file.
        SourceUnavailableError: it cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        with self._open() as fd:
            self._members = dict(_iter_members(path, fd))

    @contextmanager
    def open(
        self, path: str, span: tuple[int, int] | None = None, size_bytes: int | None = None
    ) -> Iterator[BlobStream]:
        """Open a file of the bundle; see `BlobSource.open`."""
        offset, size = self._find(path)
        if size_bytes is not None and size != size_bytes:
            msg = f"{path} has {size} bytes in the bundle; the release says {size_bytes}"
            raise WrongLengthError(msg)
        start, end = span or (0, size)
        end = min(end, size)
        with self._open() as fd:
            yield BlobStream(start, end, _wrap_span(self._path, fd, offset + start, offset + end))

    def _find(self, path: str) -> tuple[int, int]:
        try:
            return self._members[path]
        except KeyError:
            msg = f"{path} is not in the bundle {self._path.name}"
            raise SourceMissingError(msg) from None

    def _open(self) -> AbstractContextManager[int]:
        return _open_file(self._path)


def open_release_source(
    address: str | Path, *, allow_plain: bool = False, ca_file: Path | None = None
) -> ReleaseSource:
    """Return the source at an address: `https://…`, a folder, or a bundle file.

    Args:
        address: of the repository or the bundle.
        allow_plain: take `http://` to another machine, too.
        ca_file: certificates to trust instead of the system's.

    Raises:
        SourceAddressError: the address may not be used.
        BundleError, SourceUnavailableError: as for `BundleSource`.
    """
    if isinstance(address, str) and "://" in address:
        return HttpReleaseSource(address, allow_plain=allow_plain, ca_file=ca_file)
    path = Path(address)
    return BundleSource(path) if path.suffix == BUNDLE_SUFFIX else FolderReleaseSource(path)


@contextmanager
def _open_file(path: Path) -> Iterator[int]:
    """Open a plain file; never waits for a pipe, never follows a link."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError as exc:
        msg = f"{path} is not there"
        raise SourceMissingError(msg) from exc
    except OSError as exc:
        msg = f"{path} cannot be read: {exc.strerror}"
        raise SourceUnavailableError(msg) from exc
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            msg = f"{path} is no plain file"
            raise BundleError(msg)
        yield fd
    finally:
        os.close(fd)


def _iter_members(path: Path, fd: int) -> Iterator[tuple[str, tuple[int, int]]]:
    """Yield name, offset and size of each file in a tar, from its headers alone.

    `tarfile` would read extended headers of any length into memory and follow what they
    say, so only its parser of one plain header is used.
    """
    length = os.fstat(fd).st_size
    at, seen = 0, set[str]()
    while True:
        block = _read_at(path, fd, at, tarfile.BLOCKSIZE)
        if block == bytes(tarfile.BLOCKSIZE):
            return
        name, size = _parse_header(path, block)
        at += tarfile.BLOCKSIZE
        if name in seen or len(seen) >= MAX_MEMBERS:
            raise BundleError(f"{path.name}: {name} is there twice, or there are too many files")
        if at + size > length:
            raise BundleError(f"{path.name} is torn: {name} goes on past the end of the file")
        seen.add(name)
        yield name, (at, size)
        at += -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE


def _parse_header(path: Path, block: bytes) -> tuple[str, int]:
    try:
        member = tarfile.TarInfo.frombuf(block, "ascii", "strict")
    except (tarfile.HeaderError, UnicodeDecodeError) as exc:
        msg = f"{path.name} is torn, or no bundle: {exc}"
        raise BundleError(msg) from exc
    if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE):
        msg = f"{path.name}: {member.name!r} is no plain file"
        raise BundleError(msg)
    for pattern, max_bytes in _MEMBERS:
        if pattern.fullmatch(member.name):
            if member.size < 0 or (max_bytes is not None and member.size > max_bytes):
                msg = f"{path.name}: {member.name} says it has {member.size} bytes"
                raise BundleError(msg)
            return member.name, member.size
    msg = f"{path.name}: {member.name!r} belongs to no bundle"
    raise BundleError(msg)


def _read_at(path: Path, fd: int, at: int, count: int) -> bytes:
    try:
        data = os.pread(fd, count, at)
    except OSError as exc:
        msg = f"{path} cannot be read: {exc.strerror}"
        raise SourceUnavailableError(msg) from exc
    if len(data) < count:
        msg = f"{path.name} is torn: it ends at byte {at + len(data)}"
        raise BundleError(msg)
    return data


def _wrap_span(path: Path, fd: int, start: int, end: int) -> Callable[[int], bytes]:
    at = start

    def read(count: int) -> bytes:
        nonlocal at
        data = _read_at(path, fd, at, max(0, min(count, end - at)))
        at += len(data)
        return data

    return read


def _word_long(path: str, max_bytes: int) -> str:
    return f"{path} is longer than the {max_bytes} bytes that it may have"
