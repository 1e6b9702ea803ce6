"""Where blobs come from: an HTTP(S) address, or a folder on this box.

Owns what an answer must look like to be read at all. Never decides when to ask again and
writes nothing.

Invariants: only files below the configured address; no redirect, no encoded content, no
range but the one asked for, no TLS errors overlooked; no proxy from the environment. What is
read is still a stranger's: lengths are bounded here, content is verified by the caller.
"""

import ipaddress
import os
import re
import stat
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol
from urllib.parse import urlsplit

import urllib3
from urllib3.exceptions import HTTPError

from worker.errors import (
    RedirectRefusedError,
    SourceAddressError,
    SourceAnswerError,
    SourceMissingError,
    SourceUnavailableError,
    WrongLengthError,
)

_CONNECT_TIMEOUT_S = 10.0
_READ_TIMEOUT_S = 30.0
_SEGMENT = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*")
_CONTENT_RANGE = re.compile(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18}|\*)")
_OK, _PARTIAL, _RANGE_REFUSED = 200, 206, 416
_MISSING = frozenset({401, 403, 404, 410, 451})
_LATER = frozenset({408, 425, 429})


@dataclass(frozen=True, slots=True)
class BlobStream:
    """Bytes of a file at the source, as far as the source gives them."""

    start: int
    """Where in the file the first of them belongs; 0 where a range was ignored."""
    end: int | None
    """Where the last ends; None where the source does not say."""
    read: Callable[[int], bytes]
    """Returns at most so many of the next bytes; none at the end."""


class BlobSource(Protocol):
    """Opens files of a release repository."""

    def open(
        self, path: str, span: tuple[int, int] | None = None, size_bytes: int | None = None
    ) -> AbstractContextManager[BlobStream]:
        """Open a file, or a part of it. What is read raises as this does.

        Args:
            path: in the repository, such as `blobs/<sha256>`.
            span: start and end (exclusive) of the bytes wanted, one at least; the answer may
                hold fewer, or the whole file.
            size_bytes: of the whole file, where known; another length is refused.

        Raises:
            SourceAddressError: the path leads out of the repository.
            SourceUnavailableError: there is no answer, or it breaks off.
            SourceMissingError: there is no such file.
            SourceAnswerError: the answer is not to the question.
            WrongLengthError: the file has another length.
        """
        ...


def open_source(
    address: str | Path, *, allow_plain: bool = False, ca_file: Path | None = None
) -> BlobSource:
    """Return the source at an address. Asks nothing yet.

    Args:
        address: `https://…` below which the repository lies, or a folder.
        allow_plain: take `http://` to another machine, too.
        ca_file: certificates to trust instead of the system's.

    Raises:
        SourceAddressError: the address may not be used.
    """
    if isinstance(address, str) and "://" in address:
        return HttpSource(address, allow_plain=allow_plain, ca_file=ca_file)
    return FolderSource(Path(address))


class HttpSource:
    """A repository on a web server. One thread at a time.

    Args:
        address: as for `open_source`.
        allow_plain: as there.
        ca_file: as there.

    Raises:
        SourceAddressError: the address may not be used.
    """

    def __init__(
        self, address: str, *, allow_plain: bool = False, ca_file: Path | None = None
    ) -> None:
        self._base = _check_address(address, allow_plain=allow_plain)
        self._pool = urllib3.PoolManager(
            1,
            timeout=urllib3.Timeout(connect=_CONNECT_TIMEOUT_S, read=_READ_TIMEOUT_S),
            cert_reqs="CERT_REQUIRED",
            ca_certs=None if ca_file is None else str(ca_file),
        )

    @contextmanager
    def open(
        self, path: str, span: tuple[int, int] | None = None, size_bytes: int | None = None
    ) -> Iterator[BlobStream]:
        """Open a file; see `BlobSource.open`."""
        url = self._base + "/".join(_split_path(path))
        asked = None if span == (0, size_bytes) else span
        headers = {"Accept-Encoding": "identity"}
        if asked is not None:
            headers["Range"] = f"bytes={asked[0]}-{asked[1] - 1}"
        try:
            response = self._pool.request(
                "GET",
                url,
                headers=headers,
                preload_content=False,
                decode_content=False,
                redirect=False,
                retries=False,
            )
        except (HTTPError, OSError, UnicodeError) as exc:
            raise _word_failure(url, exc) from exc
        try:
            start, end = _check_answer(url, response, asked, size_bytes)
            yield BlobStream(start, end, _wrap_read(url, response))
        finally:
            # A connection whose answer was read to its end has gone back to the pool by now.
            response.close()


class FolderSource:
    """A repository in a folder of this box, such as a stick's.

    Args:
        root: the folder.
    """

    def __init__(self, root: Path) -> None:
        self._root = root

    @contextmanager
    def open(
        self, path: str, span: tuple[int, int] | None = None, size_bytes: int | None = None
    ) -> Iterator[BlobStream]:
        """Open a file; see `BlobSource.open`."""
        file = self._root.joinpath(*_split_path(path))
        start, end = span or (0, None)
        try:
            # Without blocking: what lies on a stick may be a pipe.
            fd = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except (FileNotFoundError, NotADirectoryError, PermissionError) as exc:
            raise SourceMissingError(_word_missing(file)) from exc
        except OSError as exc:
            raise _word_failure(file, exc) from exc
        try:
            found = os.fstat(fd)
            if not stat.S_ISREG(found.st_mode):
                raise SourceMissingError(_word_missing(file))
            _check_length(file, found.st_size, size_bytes)
            os.lseek(fd, start, os.SEEK_SET)
            last = found.st_size if end is None else min(end, found.st_size)
            yield BlobStream(start, last, _wrap_fd(file, fd))
        finally:
            os.close(fd)


def _check_address(address: str, *, allow_plain: bool) -> str:
    """Return the address with a slash at its end."""
    try:
        parts = urlsplit(address)
        host, _ = parts.hostname, parts.port
    except ValueError as exc:
        msg = f"the source's address is malformed: {exc}"
        raise SourceAddressError(msg) from exc
    # The address without what may be a password.
    shown = f"{parts.scheme}://{host}{parts.path}"
    if parts.scheme not in {"http", "https"} or not host:
        msg = f"{shown}: a source is https://HOST/PATH or a folder"
        raise SourceAddressError(msg)
    if "@" in parts.netloc or parts.query or parts.fragment or ".." in parts.path.split("/"):
        msg = f"{shown}: a source's address has no user, no query, no fragment and no .."
        raise SourceAddressError(msg)
    if parts.scheme == "http" and not (allow_plain or _is_loopback(host)):
        msg = f"{shown}: a source on another machine is reached by https"
        raise SourceAddressError(msg)
    return address if address.endswith("/") else f"{address}/"


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _split_path(path: str) -> list[str]:
    segments = path.split("/")
    if not all(_SEGMENT.fullmatch(segment) for segment in segments):
        msg = f"{path!r} is no path inside a release repository"
        raise SourceAddressError(msg)
    return segments


def _check_answer(
    url: str,
    response: urllib3.BaseHTTPResponse,
    asked: tuple[int, int] | None,
    size_bytes: int | None,
) -> tuple[int, int | None]:
    """Return start and end (where known) of what the answer holds."""
    _check_status(url, response.status)
    encoding = response.headers.get("Content-Encoding", "identity").strip().lower()
    if encoding not in {"", "identity"}:
        msg = f"{url}: the answer is encoded ({encoding!r}); serve the files as they are"
        raise SourceAnswerError(msg)
    length = _read_length(url, response)
    if response.status == _OK:
        if length is not None:
            _check_length(url, length, size_bytes)
        return 0, length
    if asked is None:
        msg = f"{url}: a part was sent where the whole was asked for"
        raise SourceAnswerError(msg)
    start, end = _check_range(url, response.headers.get("Content-Range", ""), asked, size_bytes)
    if length is not None and length != end - start:
        msg = f"{url}: the answer says {length} bytes, its range has {end - start}"
        raise SourceAnswerError(msg)
    return start, end


def _check_status(url: str, status: int) -> None:
    if status in {_OK, _PARTIAL}:
        return
    if 300 <= status < 400:
        msg = f"{url}: the server redirects elsewhere (status {status}); that is never followed"
        raise RedirectRefusedError(msg)
    if status in _MISSING:
        msg = f"{_word_missing(url)} (status {status})"
        raise SourceMissingError(msg)
    if status == _RANGE_REFUSED:
        msg = f"{url}: the file is shorter than the release says (status {status})"
        raise WrongLengthError(msg)
    if status >= 500 or status in _LATER:
        msg = f"{url}: the server cannot answer now (status {status})"
        raise SourceUnavailableError(msg)
    msg = f"{url}: the server answers with status {status}"
    raise SourceAnswerError(msg)


def _read_length(url: str, response: urllib3.BaseHTTPResponse) -> int | None:
    text = response.headers.get("Content-Length")
    if text is None or "Transfer-Encoding" in response.headers:
        return None
    if not (text.isdecimal() and text.isascii() and len(text) <= 18):
        msg = f"{url}: the answer's length is {text!r}"
        raise SourceAnswerError(msg)
    return int(text)


def _check_range(
    url: str, text: str, asked: tuple[int, int], size_bytes: int | None
) -> tuple[int, int]:
    match = _CONTENT_RANGE.fullmatch(text)
    if match is None:
        msg = f"{url}: a part was sent without saying which ({text!r})"
        raise SourceAnswerError(msg)
    start, end = int(match[1]), int(match[2]) + 1
    if start != asked[0] or not start < end <= asked[1]:
        msg = f"{url}: asked for bytes {asked[0]}-{asked[1] - 1}, was sent {text!r}"
        raise SourceAnswerError(msg)
    if match[3] != "*":
        _check_length(url, int(match[3]), size_bytes)
    return start, end


def _check_length(where: str | Path, found: int, expected: int | None) -> None:
    if expected is not None and found != expected:
        msg = f"{where} has {found} bytes; the release says {expected}"
        raise WrongLengthError(msg)


def _wrap_read(url: str, response: urllib3.BaseHTTPResponse) -> Callable[[int], bytes]:
    def read(count: int) -> bytes:
        try:
            # What has arrived, and no waiting for more: a cut then loses nothing.
            return response.read1(count, decode_content=False)
        except (HTTPError, OSError) as exc:
            raise _word_failure(url, exc) from exc

    return read


def _wrap_fd(file: Path, fd: int) -> Callable[[int], bytes]:
    def read(count: int) -> bytes:
        try:
            return os.read(fd, count)
        except OSError as exc:
            raise _word_failure(file, exc) from exc

    return read


def _word_failure(where: str | Path, exc: Exception) -> SourceUnavailableError:
    return SourceUnavailableError(f"{where} cannot be read: {type(exc).__name__}: {exc}")


def _word_missing(where: str | Path) -> str:
    return f"{where} is not there, or not for this box"
