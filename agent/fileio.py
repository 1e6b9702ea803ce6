"""Files that survive a power cut: write, flush, rename, flush the folder."""

import os
from pathlib import Path


def fsync_dir(folder: Path) -> None:
    """Flush a folder's entries to the disk, so that a rename in it is durable."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def fsync_tree(folder: Path) -> None:
    """Flush every file and folder below `folder`, and itself."""
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        elif path.is_dir() and not path.is_symlink():
            fsync_dir(path)
    fsync_dir(folder)


def make_folders(folder: Path) -> None:
    """Make a folder and those above it that are missing, each durable in the one above."""
    if folder.is_dir():
        return
    if folder.parent != folder:
        make_folders(folder.parent)
    folder.mkdir(exist_ok=True)
    fsync_dir(folder.parent)


def write_atomic(path: Path, text: str, *, durable: bool = True) -> None:
    """Replace `path` with `text` in one step; a reader sees the old or the new, never a part."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    with part.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        if durable:
            os.fsync(file.fileno())
    part.replace(path)
    if durable:
        fsync_dir(path.parent)


def append_line(path: Path, line: str) -> None:
    """Append one line to `path` and flush it; creates the file and its folder.

    Raises:
        OSError: it could not be written whole (disk full); what was written is cut off again.
    """
    created = not path.exists()
    make_folders(path.parent)
    with path.open("ab", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        try:
            _write_all(file.fileno(), line.encode() + b"\n")
            os.fsync(file.fileno())
        except OSError:
            file.truncate(size)
            raise
    if created:
        fsync_dir(path.parent)


def _write_all(fd: int, data: bytes) -> None:
    while data:
        data = data[os.write(fd, data) :]


def replace_link(link: Path, target: str) -> None:
    """Point the symbolic link `link` at `target` in one durable step."""
    part = link.with_name(f".{link.name}.{os.getpid()}.part")
    part.unlink(missing_ok=True)
    part.symlink_to(target)
    part.replace(link)
    fsync_dir(link.parent)
