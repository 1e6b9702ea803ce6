"""Reading the files that jobs name, below configured folders and nowhere else.

Owns the walk from a root to a file. Never follows a link below a root, never goes
up, never opens anything but a regular file, and never reads more than it was allowed.

Invariants: each component is opened relative to the one before (`dir_fd`, with
`O_NOFOLLOW`), so a link put in place while we walk is refused as well. The root
itself belongs to the operator and may be reached through links.
"""

import errno
import hashlib
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from agent.errors import (
    DigestMismatchError,
    InputError,
    InputNotFoundError,
    InputTooLargeError,
    PathNotAllowedError,
)

_FOLDER_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
# O_NONBLOCK: were the file swapped for a FIFO after our look at it, open would wait for ever.
_FILE_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC


@contextmanager
def open_below(roots: Sequence[Path], path: str | Path) -> Iterator[BinaryIO]:
    """Open a regular file below one of `roots` for reading.

    An absolute path must lie below one of the roots as written; any other is taken
    relative to the first.

    Raises:
        PathNotAllowedError: it lies outside the roots, has `..`, goes through a link, or
            cannot be a path at all.
        InputNotFoundError: a part of it does not exist, or the end is no regular file.
        InputError: the operating system refuses to open it (permissions, I/O error).
    """
    root, parts = _split(roots, path)
    try:
        descriptor = _walk(root, parts, str(path))
    except OSError as exc:
        raise _translate(exc, path) from exc
    with os.fdopen(descriptor, "rb") as file:
        yield file


def read_below(
    roots: Sequence[Path],
    path: str | Path,
    max_bytes: int,
    *,
    sha256: str | None = None,
    size_bytes: int | None = None,
) -> bytes:
    """Return the content of a regular file below one of `roots`.

    Where the sender says what it must be, `sha256` (hex) and `size_bytes` are checked.

    Raises:
        PathNotAllowedError, InputNotFoundError, InputError: as `open_below`.
        InputTooLargeError: it has more than `max_bytes`.
        DigestMismatchError: it has another size or digest than expected.
    """
    with open_below(roots, path) as file:
        _check_size(os.fstat(file.fileno()).st_size, max_bytes, path)
        # One byte more than allowed: a file may grow while it is read.
        try:
            content = file.read(max_bytes + 1)
        except OSError as exc:
            raise _translate(exc, path) from exc
    _check_size(len(content), max_bytes, path)
    if size_bytes is not None and len(content) != size_bytes:
        msg = f"{str(path)!r} has {len(content)} bytes, the job says {size_bytes}"
        raise DigestMismatchError(msg)
    if sha256 is not None and hashlib.sha256(content).hexdigest() != sha256.lower():
        msg = f"{str(path)!r} has another sha256 than the job says: it was changed or replaced"
        raise DigestMismatchError(msg)
    return content


def _check_size(found: int, max_bytes: int, path: str | Path) -> None:
    if found > max_bytes:
        msg = f"{str(path)!r} has more than the {max_bytes} bytes that a job's input may have"
        raise InputTooLargeError(msg)


def _split(roots: Sequence[Path], path: str | Path) -> tuple[Path, tuple[str, ...]]:
    """Return the root that `path` is below and the parts from there to the file."""
    wanted = Path(path)
    if ".." in wanted.parts:
        msg = f"{str(path)!r} goes up with '..': name the file from its root"
        raise PathNotAllowedError(msg)
    if wanted.is_absolute():
        root = next((root for root in roots if wanted.is_relative_to(root)), None)
    else:
        root = next(iter(roots), None)
    parts = wanted.relative_to(root).parts if root and wanted.is_absolute() else wanted.parts
    if root is None or not parts:
        allowed = ", ".join(map(str, roots)) or "any root, since none is configured"
        msg = f"{str(path)!r} names no file below {allowed}"
        raise PathNotAllowedError(msg)
    return root, parts


def _walk(root: Path, parts: tuple[str, ...], shown: str) -> int:
    """Return the descriptor of the file at `parts` below `root`."""
    folder = os.open(root, _FOLDER_FLAGS)
    try:
        for part in parts[:-1]:
            _refuse_link(folder, part, shown)
            below = os.open(part, _FOLDER_FLAGS | os.O_NOFOLLOW, dir_fd=folder)
            os.close(folder)
            folder = below
        return _open_regular(folder, parts[-1], shown)
    except ValueError as exc:
        # A NUL byte, or a surrogate that no file name can hold.
        msg = f"{shown!r} cannot be a path: {exc}"
        raise PathNotAllowedError(msg) from exc
    finally:
        os.close(folder)


def _open_regular(folder: int, name: str, shown: str) -> int:
    # Looked at before it is opened: opening a device can do something (rewind, reset).
    if not stat.S_ISREG(_refuse_link(folder, name, shown)):
        raise _not_regular(shown)
    descriptor = os.open(name, _FILE_FLAGS, dir_fd=folder)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise _not_regular(shown)
    return descriptor


def _refuse_link(folder: int, name: str, shown: str) -> int:
    """Return the mode of `name` in `folder`, unless it is a symbolic link."""
    mode = os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode
    if stat.S_ISLNK(mode):
        msg = f"{shown!r} goes through the link {name!r}: name the file it points to"
        raise PathNotAllowedError(msg)
    return mode


def _not_regular(shown: str) -> InputNotFoundError:
    return InputNotFoundError(f"{shown!r} is no regular file")


def _translate(exc: OSError, path: str | Path) -> InputError:
    if exc.errno == errno.ELOOP:
        return PathNotAllowedError(f"{str(path)!r} goes through a link")
    if exc.errno in {errno.ENOENT, errno.ENOTDIR, errno.ENXIO}:
        return InputNotFoundError(f"{str(path)!r} does not exist")
    if exc.errno == errno.ENAMETOOLONG:
        return PathNotAllowedError(f"{str(path)!r} cannot be a path: it is too long")
    return InputError(f"{str(path)!r} cannot be read: {exc.strerror}")
