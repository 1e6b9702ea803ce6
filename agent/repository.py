"""The model repository: versions of models on disk, and which one is active.

    <models>/<name>/1/   manifest.json  model.onnx …
                   2/   …
                   current -> 2      previous -> 1
    <models>/.blobs/<sha256>         content-addressed; versions hard-link it

Invariants: a version's folder appears by one rename, complete, verified and
flushed; `current` and `previous` are links replaced by one rename; a link never
points at what is not there. Readers need no lock. Changes hold a file lock.
"""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from agent.errors import (
    ManifestError,
    ModelError,
    ModelNotFoundError,
    RepositoryBusyError,
    VersionNotFoundError,
)
from agent.fileio import fsync_dir, fsync_tree, make_folders, replace_link, write_atomic
from agent.manifest import (
    MANIFEST_FILE,
    Manifest,
    compute_sha256,
    parse_manifest,
    read_manifest,
    verify_files,
    write_manifest,
)
from agent.traffic import TRAFFIC_FILE

CURRENT = "current"
PREVIOUS = "previous"
_BLOBS = ".blobs"
_LOCK = ".lock"
_STAGING = ".staging-"
_PIN = "pinned"


@dataclass(frozen=True)
class ModelVersion:
    """One version of a model on disk."""

    name: str
    number: int
    release: str
    """The publisher's name for it, from the manifest."""
    folder: Path
    is_active: bool = False
    is_previous: bool = False


class ModelRepository:
    """Reads and changes the models under one folder.

    Args:
        root: the repository's folder; created when something is added.
    """

    def __init__(self, root: Path) -> None:
        self._root = root

    @property
    def root(self) -> Path:
        """The repository's folder."""
        return self._root

    # --- reading -------------------------------------------------------------------------

    def list_models(self) -> list[str]:
        """Return the names of the models that have a version, sorted."""
        if not self._root.is_dir():
            return []
        folders = (path for path in self._root.iterdir() if path.name[0] != ".")
        return sorted(path.name for path in folders if path.is_dir() and _numbers(path))

    def has_active(self, name: str) -> bool:
        """Say whether a model has an active version. One look at the disk."""
        return "/" not in name and (self._root / name / CURRENT / MANIFEST_FILE).is_file()

    def list_versions(self, name: str) -> list[ModelVersion]:
        """Return a model's versions, oldest first.

        Raises:
            ModelNotFoundError: there is no such model.
        """
        folder = self._get_folder(name)
        active, previous = _read_link(folder / CURRENT), _read_link(folder / PREVIOUS)
        return [
            ModelVersion(
                name,
                number,
                _read_release(folder / str(number)),
                folder / str(number),
                is_active=number == active,
                is_previous=number == previous,
            )
            for number in _numbers(folder)
        ]

    def get_version(self, name: str, version: str | None = None) -> ModelVersion:
        """Return the active version, or the one of this number or release.

        Raises:
            ModelNotFoundError: there is no such model, or none of its versions is active.
            VersionNotFoundError: it has no such version.
        """
        versions = self.list_versions(name)
        if version is None:
            found = next((item for item in versions if item.is_active), None)
            if found is None:
                msg = f"model {name!r} has no active version: edgeward models activate {name} N"
                raise ModelNotFoundError(msg)
            return found
        matches = [item for item in versions if version in (str(item.number), item.release)]
        if not matches:
            known = ", ".join(f"{item.number} ({item.release})" for item in versions)
            msg = f"model {name!r} has no version {version!r}; it has {known}"
            raise VersionNotFoundError(msg)
        return matches[-1]

    def get_folder(self, name: str, version: str | None = None) -> Path:
        """Return the folder of the active version, or of the one named. Quick for the active one.

        Raises:
            ModelNotFoundError, VersionNotFoundError: there is no such thing.
        """
        if version is None and "/" not in name:
            number = _read_link(self._root / name / CURRENT)
            if number is not None:
                return self._root / name / str(number)
        return self.get_version(name, version).folder

    def _get_folder(self, name: str) -> Path:
        folder = self._root / name
        if "/" in name or name[:1] in ("", ".") or not folder.is_dir() or not _numbers(folder):
            known = ", ".join(self.list_models()) or "none"
            msg = f"no model {name!r} here; there are: {known}"
            raise ModelNotFoundError(msg)
        return folder

    def is_pinned(self, name: str) -> bool:
        """Say whether somebody on the box keeps a model as it is."""
        return (self._root / name / _PIN).exists()

    # --- changing --------------------------------------------------------------------------

    def add(self, source: Path, name: str | None = None, *, activate: bool = True) -> ModelVersion:
        """Add the version in the folder `source` and, if asked, make it the active one.

        The files are verified against the manifest, copied, flushed, and appear
        by one rename. A crash leaves at most a staging folder that nobody reads
        and the next change removes.

        Args:
            source: a folder with a manifest and its files.
            name: the model's name here; else the manifest's.
            activate: make it the active version.

        Raises:
            ManifestError: the manifest is not valid, or a file of it is missing.
            DigestMismatchError: a file is not what the manifest says.
            RepositoryBusyError: another process is changing the repository.
        """
        manifest = read_manifest(source)
        if name is not None and name != manifest.name:
            manifest = parse_manifest(
                manifest.model_copy(update={"name": name}).model_dump_json(by_alias=True)
            )
        verify_files(manifest, source)
        with self._lock():
            model = self._root / manifest.name
            make_folders(model)
            number = max(_numbers(model), default=0) + 1
            self._remove_staging()
            staging = model / f"{_STAGING}{number}"
            self._stage(manifest, source, staging)
            staging.rename(model / str(number))
            # Whoever made one of these folders may have died before it was flushed.
            for folder in (model, self._root, self._root.parent):
                fsync_dir(folder)
            if activate:
                self._activate(model, number)
        return self.get_version(manifest.name, str(number))

    def _stage(self, manifest: Manifest, source: Path, staging: Path) -> None:
        blobs = self._root / _BLOBS
        make_folders(blobs)
        staging.mkdir()
        digests = {entry.file: entry.sha256 for entry in manifest.artifacts} | manifest.files
        for name, digest in digests.items():
            target = staging / name
            target.parent.mkdir(parents=True, exist_ok=True)
            blob = blobs / digest
            if not (blob.exists() and compute_sha256(blob) == digest):
                part = blobs / f".{digest}.part"
                shutil.copyfile(source / name, part)
                with part.open("rb") as file:
                    os.fsync(file.fileno())
                part.replace(blob)
            os.link(blob, target)
        write_manifest(manifest, staging)
        # Verified again where it will serve from: the source may have changed meanwhile.
        verify_files(manifest, staging)
        fsync_tree(staging)
        fsync_dir(blobs)

    def activate(self, name: str, version: str) -> ModelVersion:
        """Make a version the active one; the one before becomes `previous`.

        Raises:
            ModelNotFoundError, VersionNotFoundError: there is no such thing.
            DigestMismatchError, ManifestError: its files are damaged.
            RepositoryBusyError: another process is changing the repository.
        """
        found = self.get_version(name, version)
        verify_files(read_manifest(found.folder), found.folder)
        with self._lock():
            self._activate(found.folder.parent, found.number)
        return self.get_version(name)

    def _activate(self, model: Path, number: int) -> None:
        before = _read_link(model / CURRENT)
        if before == number:
            return
        if before is not None:
            replace_link(model / PREVIOUS, str(before))
        replace_link(model / CURRENT, str(number))

    def roll_back(self, name: str) -> ModelVersion:
        """Make the previous version the active one again. Needs no network.

        Raises:
            ModelNotFoundError: there is no such model.
            VersionNotFoundError: it has no previous version.
        """
        previous = next((item for item in self.list_versions(name) if item.is_previous), None)
        if previous is None:
            msg = f"model {name!r} has no previous version to go back to"
            raise VersionNotFoundError(msg)
        return self.activate(name, str(previous.number))

    def pin(self, name: str) -> None:
        """Keep a model as it is, whatever a console wants.

        Raises:
            ModelNotFoundError: there is no such model.
        """
        folder = self._get_folder(name)
        write_atomic(folder / _PIN, "")

    def unpin(self, name: str) -> None:
        """Let a console decide about a model again.

        Raises:
            ModelNotFoundError: there is no such model.
        """
        (self._get_folder(name) / _PIN).unlink(missing_ok=True)

    def restore(self, name: str, active: int | None, previous: int | None) -> None:
        """Set a model's links to what they were before an update. Needs no network.

        Args:
            name: of the model.
            active: number of the version to serve; None: none.
            previous: what `previous` named then; one that is gone counts as none.

        Raises:
            ModelNotFoundError, VersionNotFoundError: there is no such model, or no such version.
            RepositoryBusyError: another process is changing the repository.
        """
        numbers = {item.number for item in self.list_versions(name)}
        if active is not None and active not in numbers:
            msg = f"model {name!r} has no version {active} to go back to"
            raise VersionNotFoundError(msg)
        with self._lock():
            model = self._root / name
            # The switch comes first: it is what matters.
            for link, number in ((CURRENT, active), (PREVIOUS, previous)):
                if number in numbers:
                    replace_link(model / link, str(number))
                elif (model / link).is_symlink():
                    (model / link).unlink()
            fsync_dir(model)

    def remove(self, name: str, version: str | None = None) -> list[int]:
        """Remove one version, or the whole model; return the numbers removed.

        Raises:
            ModelNotFoundError, VersionNotFoundError: there is no such thing.
            ModelError: the version is the active one.
            RepositoryBusyError: another process is changing the repository.
        """
        versions = self.list_versions(name)
        if version is not None:
            versions = [self.get_version(name, version)]
            if versions[0].is_active:
                msg = f"version {version} of {name!r} is active: activate another one first"
                raise ModelError(msg)
        with self._lock():
            model = versions[0].folder.parent
            for link in (CURRENT, PREVIOUS):
                gone = _read_link(model / link) in [item.number for item in versions]
                if gone:
                    (model / link).unlink()
            doomed = [model / f"{_STAGING}removed-{item.number}" for item in versions]
            for item, folder in zip(versions, doomed, strict=True):
                # A remove that was cut short may have left one of that name.
                shutil.rmtree(folder, ignore_errors=True)
                item.folder.rename(folder)
            # No longer a version for sure, before the first of its files goes.
            fsync_dir(model)
            for folder in doomed:
                shutil.rmtree(folder)
            self._collect_garbage()
            if not _numbers(model):
                for name in (TRAFFIC_FILE, _PIN):
                    (model / name).unlink(missing_ok=True)
            with suppress(OSError):
                model.rmdir()
        return [item.number for item in versions]

    def _collect_garbage(self) -> None:
        """Remove blobs that no version links any more, and staging folders of a crash."""
        # First: what is left of a version links its blobs.
        self._remove_staging()
        for blob in (self._root / _BLOBS).iterdir():
            if blob.stat().st_nlink == 1:
                blob.unlink()

    def _remove_staging(self) -> None:
        for staging in self._root.glob(f"*/{_STAGING}*"):
            shutil.rmtree(staging, ignore_errors=True)

    @contextmanager
    def _lock(self) -> Iterator[None]:
        make_folders(self._root)
        with (self._root / _LOCK).open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as exc:
                msg = "another process is changing the model repository; try again"
                raise RepositoryBusyError(msg) from exc
            yield


def _numbers(model: Path) -> list[int]:
    return sorted(int(path.name) for path in model.iterdir() if path.name.isdecimal())


def _read_link(link: Path) -> int | None:
    try:
        target = str(link.readlink())
    except OSError:
        return None
    return int(target) if target.isdecimal() else None


def _read_release(folder: Path) -> str:
    try:
        return read_manifest(folder).version
    except ManifestError:
        return "(damaged)"
