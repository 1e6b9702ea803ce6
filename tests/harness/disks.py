"""Small disks: a tmpfs of some megabytes, mounted for one test."""

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

_BLOCK = 4096


class NoMountError(Exception):
    """This user may not mount anything here."""


@contextlib.contextmanager
def mounted_disk(folder: Path, size_bytes: int) -> Iterator[Path]:
    """Mount a disk of that size on a new folder.

    Raises:
        NoMountError: neither this user nor `sudo` without a password may.
    """
    folder.mkdir(parents=True)
    for prefix in ([], ["sudo", "-n"]):
        options = f"size={size_bytes},uid={os.getuid()},gid={os.getgid()},mode=0700"
        argv = [*prefix, "mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        if shutil.which(argv[0]) and not subprocess.run(argv, capture_output=True).returncode:
            break
    else:
        raise NoMountError
    try:
        yield folder
    finally:
        # Lazily: a test that failed may have left a file open.
        subprocess.run([*prefix, "umount", "-l", str(folder)], check=True)


def has_namespaces() -> bool:
    """Say whether this user may mount in a namespace of its own."""
    if shutil.which("unshare") is None:
        return False
    argv = ["unshare", "-rm", "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
    return not subprocess.run(argv, capture_output=True).returncode


def measure_free(folder: Path) -> int:
    """Return the free bytes of a folder's disk."""
    found = os.statvfs(folder)
    return found.f_bavail * found.f_frsize


def fill_disk(folder: Path, leave_bytes: int = 0) -> Path:
    """Write a file that leaves no more than that free, and return it."""
    filler = folder / "filler"
    with filler.open("ab", buffering=0) as file, contextlib.suppress(OSError):
        while measure_free(folder) > leave_bytes:
            file.write(bytes(_BLOCK))
    return filler
