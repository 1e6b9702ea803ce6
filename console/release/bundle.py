"""A bundle: one release with its metadata and blobs in one file, for a USB stick.

Owns what goes into it. It is an uncompressed tar, so that a box reads it in place; what a box
accepts of one is `worker.update.sources`'s. Bundles of the same release and metadata are the
same bytes.
"""

import os
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from tuf.api.metadata import Root, Snapshot, TargetFile

from agent.fileio import fsync_dir
from agent.release import BLOBS_DIR, METADATA_DIR, name_target, parse_release
from console.errors import ReleaseRepositoryError
from console.release.repository import ReleaseRepository
from worker.errors import ReleaseUnknownError

_END = bytes(2 * tarfile.BLOCKSIZE)


def write_bundle(repository: ReleaseRepository, name: str, version: str, path: Path) -> None:
    """Write a release that is published as one file, in one step.

    Raises:
        ReleaseUnknownError: no such release is published.
        ReleaseRepositoryError: a file of it is missing in the repository.
    """
    target = _find_target(repository, name, version)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            for member in _iter_files(repository, target):
                _append(file, repository.folder, member)
            file.write(_END)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
        fsync_dir(path.parent)
    finally:
        part.unlink(missing_ok=True)


def _find_target(repository: ReleaseRepository, name: str, version: str) -> TargetFile:
    path = name_target(name, version)
    for role in repository.list_publishers():
        published = repository.find_published(role)
        found = None if published is None else published.metadata.signed.targets.get(path)
        if found is not None:
            target: TargetFile = found
            return target
    msg = f"no release {version} of {name} is published: edgeward release list"
    raise ReleaseUnknownError(msg)


def _iter_files(repository: ReleaseRepository, target: TargetFile) -> Iterator[Path]:
    """Yield the files that a box reads to verify and install a release."""
    metadata = repository.folder / METADATA_DIR
    yield metadata / "timestamp.json"
    root = repository.find_published(Root.type)
    snapshot = repository.find_published(Snapshot.type)
    if root is None or snapshot is None:
        raise ReleaseRepositoryError(f"nothing is published in {repository.folder}")
    # From the first: a box may have been given any of them.
    yield from (metadata / f"{number}.root.json" for number in range(1, root.version + 1))
    yield metadata / f"{snapshot.version}.{Snapshot.type}.json"
    for file, meta in sorted(snapshot.metadata.signed.meta.items()):
        yield metadata / f"{meta.version}.{file}"
    place = repository.locate_target(target)
    yield place
    digests = {file.sha256 for file in parse_release(place.read_bytes()).files}
    yield from (repository.folder / BLOBS_DIR / digest for digest in sorted(digests))


def _append(file: BinaryIO, folder: Path, path: Path) -> None:
    name = path.relative_to(folder).as_posix()
    member = tarfile.TarInfo(name)
    member.mode = 0o644
    try:
        member.size = path.stat().st_size
        # The one form has room for long names, the other for files of more than 8 GiB.
        if len(name) > tarfile.LENGTH_NAME:
            file.write(member.tobuf(tarfile.USTAR_FORMAT, "ascii", "strict"))
        else:
            file.write(member.tobuf(tarfile.GNU_FORMAT, "ascii", "strict"))
        with path.open("rb") as source:
            shutil.copyfileobj(source, file, 1 << 20)
    except FileNotFoundError as exc:
        raise ReleaseRepositoryError(f"{name} is missing in {folder}") from exc
    file.write(bytes(-member.size % tarfile.BLOCKSIZE))
