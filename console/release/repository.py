"""The repository of a publisher: releases, the metadata over them, and what waits for signatures.

Owns the folder whose layout `agent.release` describes, and `staged/` in it: metadata that
was changed and has not all its signatures yet, which no box reads. Who may sign what is
TUF's; what is signed and published now is `console.release.signing`'s.

Invariants: below `metadata/` lies only what has all its signatures, and a numbered file never
changes once a timestamp leads to it; a version of a model, once released, never changes; blobs
are there before the metadata that leads to them.

Source: TUF specification 1.0.33, with consistent snapshots; docs/adr/0021-tuf.md.
"""

import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tuf.api.exceptions import RepositoryError
from tuf.api.metadata import (
    DelegatedRole,
    Delegations,
    Metadata,
    Root,
    Snapshot,
    TargetFile,
    Targets,
    Timestamp,
)

from agent.errors import DigestMismatchError, RepositoryBusyError
from agent.fileio import fsync_dir, write_atomic
from agent.manifest import (
    MANIFEST_FILE,
    compute_sha256,
    read_manifest,
    verify_files,
    write_manifest,
)
from agent.release import (
    BLOBS_DIR,
    CHUNKS_DIR,
    METADATA_DIR,
    RELEASE_FILE,
    TARGETS_DIR,
    ReleaseDocument,
    ReleaseFile,
    name_target,
    parse_release,
)
from console.errors import ReleaseExistsError, ReleaseRepositoryError
from worker.update.chunks import MIN_INDEXED_BYTES, write_chunk_index

if TYPE_CHECKING:
    from securesystemslib.signer import Key

    from console.release.keys import KeyRing

DEFAULT_DAYS: Mapping[str, int] = {
    Root.type: 365,
    Targets.type: 365,
    Snapshot.type: 30,
    Timestamp.type: 30,
}
"""How long a signature holds; a publisher's is that of `targets`."""
TOP_ROLES = tuple(DEFAULT_DAYS)
STAGED_DIR = "staged"

_DAYS_KEY = "x-edgeward-days"
_LOCK = ".lock"


@dataclass(frozen=True, slots=True)
class Signed:
    """Metadata of a role with the bytes that it was read from, or will be written as."""

    role: str
    metadata: Metadata[Any]
    data: bytes

    @property
    def version(self) -> int:
        """Of the metadata."""
        version: int = self.metadata.signed.version
        return version


@dataclass(frozen=True, slots=True)
class ListedRelease:
    """A release of the repository."""

    name: str
    version: str
    publisher: str
    is_staged: bool
    """Waits for signatures; no box sees it."""
    document: ReleaseDocument


class ReleaseRepository:
    """A release repository in a folder.

    Args:
        folder: of the repository.
        clock: what time it is, aware.
    """

    def __init__(
        self, folder: Path, clock: Callable[[], datetime] = lambda: datetime.now(UTC)
    ) -> None:
        self.folder = folder
        self.clock = clock

    def create(
        self, ring: "KeyRing", *, root_keys: int, root_threshold: int, days: Mapping[str, int]
    ) -> None:
        """Stage the first metadata; keys that are not there are made.

        Raises:
            ReleaseRepositoryError: there is one already, or the threshold cannot be met.
            SigningKeyError: a key cannot be made.
        """
        if not 1 <= root_threshold <= root_keys:
            msg = f"{root_threshold} of {root_keys} keys cannot sign the root"
            raise ReleaseRepositoryError(msg)
        if self.find_published(Root.type) is not None:
            raise ReleaseRepositoryError(f"{self.folder} is a release repository already")
        for name in (METADATA_DIR, TARGETS_DIR, BLOBS_DIR, CHUNKS_DIR, STAGED_DIR):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        root = Root(consistent_snapshot=True, unrecognized_fields={_DAYS_KEY: dict(days)})
        for number in range(1, root_keys + 1):
            root.add_key(ring.get_or_create(f"root-{number}"), Root.type)
        root.roles[Root.type].threshold = root_threshold
        for role in (Targets.type, Snapshot.type, Timestamp.type):
            root.add_key(ring.get_or_create(role), role)
        root.expires = self._expire(days[Root.type])
        self.write_staged(Root.type, Metadata(root))
        self.write_staged(Targets.type, Metadata(Targets(expires=self._expire(days[Targets.type]))))

    # What is there

    def find_published(self, role: str) -> Signed | None:
        """Return the newest metadata of a role as boxes see it."""
        if role == Timestamp.type:
            return self._find(role, METADATA_DIR, f"{role}.json")
        if role == Root.type:
            numbers = self._number_roots()
            return self._find(role, METADATA_DIR, f"{numbers[-1]}.root.json") if numbers else None
        version = self._find_version(role)
        return self._find(role, METADATA_DIR, f"{version}.{role}.json") if version else None

    def find_staged(self, role: str) -> Signed | None:
        """Return metadata of a role that waits for signatures."""
        staged = self._find(role, STAGED_DIR, f"{role}.json")
        published = self.find_published(role)
        if staged is not None and published is not None and staged.version <= published.version:
            # A crash between publishing it and removing it here.
            return None
        return staged

    def get_current(self, role: str) -> Signed:
        """Return the metadata of a role with all changes, signed or not.

        Raises:
            ReleaseRepositoryError: there is none.
        """
        found = self.find_staged(role) or self.find_published(role)
        if found is None:
            if role in TOP_ROLES:
                msg = f"{self.folder} is no release repository: edgeward release init"
            else:
                msg = f"there is no publisher {role!r}: edgeward keys delegate"
            raise ReleaseRepositoryError(msg)
        return found

    def list_staged(self) -> list[str]:
        """Return the roles with metadata that waits for signatures."""
        names = sorted(path.stem for path in (self.folder / STAGED_DIR).glob("*.json"))
        return [name for name in names if self.find_staged(name) is not None]

    def list_publishers(self) -> list[str]:
        """Return the roles that sign releases: `targets` and each publisher, staged ones too."""
        return [Targets.type, *find_delegations(self.get_current(Targets.type))]

    def list_releases(self) -> list[ListedRelease]:
        """Return all releases, by name and version."""
        found = [item for role in self.list_publishers() for item in self._iter_releases(role)]
        return sorted(found, key=lambda item: (item.name, item.version))

    def _iter_releases(self, role: str) -> Iterator[ListedRelease]:
        try:
            current = self.get_current(role)
        except ReleaseRepositoryError:
            return
        published = self.find_published(role)
        known = {} if published is None else published.metadata.signed.targets
        for path, target in current.metadata.signed.targets.items():
            name, version, _ = path.split("/")
            document = parse_release(self.locate_target(target).read_bytes())
            yield ListedRelease(name, version, role, known.get(path) != target, document)

    def locate_target(self, target: TargetFile) -> Path:
        """Return where a `release.json` lies."""
        folder, _, file = target.path.rpartition("/")
        return self.folder / TARGETS_DIR / folder / f"{target.hashes['sha256']}.{file}"

    def get_days(self) -> dict[str, int]:
        """Return how long signatures hold, by role, as the root says."""
        root = self.get_current(Root.type).metadata.signed
        return {**DEFAULT_DAYS, **root.unrecognized_fields.get(_DAYS_KEY, {})}

    def _number_roots(self) -> list[int]:
        files = (self.folder / METADATA_DIR).glob("*.root.json")
        return sorted(int(file.name.split(".")[0]) for file in files)

    def _find_version(self, role: str) -> int | None:
        timestamp = self.find_published(Timestamp.type)
        if timestamp is None:
            return None
        version: int = timestamp.metadata.signed.snapshot_meta.version
        if role == Snapshot.type:
            return version
        snapshot = self._find(Snapshot.type, METADATA_DIR, f"{version}.snapshot.json")
        meta = None if snapshot is None else snapshot.metadata.signed.meta.get(f"{role}.json")
        return None if meta is None else meta.version

    def _find(self, role: str, folder: str, file: str) -> Signed | None:
        path = self.folder / folder / file
        try:
            data = path.read_bytes()
            return Signed(role, Metadata.from_bytes(data), data)
        except FileNotFoundError:
            return None
        except RepositoryError as exc:
            raise ReleaseRepositoryError(f"{path} is damaged: {exc}") from exc

    # Changes, all of which wait for signatures

    def add_release(
        self, name: str, version: str, folder: Path, publisher: str = Targets.type
    ) -> ListedRelease:
        """Take a version folder over as a release, and stage it to be signed.

        Args:
            name: of the model; the manifest's is set to it.
            version: of the model; likewise.
            folder: with manifest.json and all files that it names.
            publisher: who signs it: `targets`, or a publisher that was delegated to.

        Raises:
            ManifestError, DigestMismatchError: the folder is not what its manifest says.
            ReleaseExistsError: that version was released with other content.
            ReleaseRepositoryError: the publisher may not sign that model.
        """
        self._check_publisher(name, version, publisher)
        files = tuple(self._iter_blobs(name, version, folder))
        document = ReleaseDocument(
            schema="edgeward.release/v1", name=name, version=version, files=files
        )
        listed = ListedRelease(name, version, publisher, True, document)
        text = _serialize(document)
        target = TargetFile.from_data(name_target(name, version), text, ["sha256"])
        for other in self.list_publishers():
            released = self._find_target(other, target.path)
            if released is not None and released.hashes != target.hashes:
                msg = (
                    f"{name} {version} was released by {other} with other content: "
                    "give what is new a new version"
                )
                raise ReleaseExistsError(msg)
            if released is not None:
                return listed
        path = self.locate_target(target)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, text.decode())

        def add(targets: Targets) -> None:
            targets.targets[target.path] = target

        self.stage(publisher, add)
        return listed

    def delegate(self, publisher: str, pattern: str, key: "Key") -> None:
        """Give a key of its own the releases of the models that a pattern names.

        The first delegation whose pattern fits a model decides: it ends the search.

        Raises:
            ReleaseRepositoryError: the name is taken, or cannot be one.
        """
        if publisher in TOP_ROLES or publisher in self.list_publishers():
            raise ReleaseRepositoryError(f"{publisher!r} is the name of a role already")
        paths = [f"{pattern}/*/{RELEASE_FILE}"]

        def add(targets: Targets) -> None:
            if targets.delegations is None:
                targets.delegations = Delegations({}, {})
            roles = targets.delegations.roles or {}
            roles[publisher] = DelegatedRole(publisher, [], 1, True, paths)
            targets.delegations.roles = roles
            targets.add_key(key, publisher)

        self.stage(Targets.type, add)
        expires = self._expire(self.get_days()[Targets.type])
        self.write_staged(publisher, Metadata(Targets(expires=expires)))

    def change_keys(
        self, role: str, *, add: "list[Key]", remove: list[str], threshold: int | None = None
    ) -> None:
        """Change who signs for a role.

        Raises:
            ReleaseRepositoryError: there is no such role or key, or too few keys would be left.
        """
        delegator = Root.type if role in TOP_ROLES else Targets.type

        def change(signed: Root | Targets) -> None:
            for key in add:
                signed.add_key(key, role)
            for keyid in remove:
                signed.revoke_key(keyid, role)
            found = signed.get_delegated_role(role)
            found.threshold = threshold or found.threshold
            if len(found.keyids) < found.threshold:
                msg = (
                    f"{role} would have {len(found.keyids)} keys, and {found.threshold} must sign: "
                    "give it another key first, or use `edgeward keys rotate`"
                )
                raise ReleaseRepositoryError(msg)

        try:
            self.stage(delegator, change)
        except ValueError as exc:
            raise ReleaseRepositoryError(str(exc)) from exc

    def stage(self, role: str, change: Callable[[Any], None]) -> Signed:
        """Stage a changed copy of a role's metadata, as its next version and without signatures."""
        current = self.get_current(role)
        published = self.find_published(role)
        metadata: Metadata[Any] = Metadata.from_bytes(current.data)
        change(metadata.signed)
        metadata.signed.version = 1 if published is None else published.version + 1
        kind = role if role in TOP_ROLES else Targets.type
        metadata.signed.expires = self._expire(self.get_days()[kind])
        metadata.signatures.clear()
        return self.write_staged(role, metadata)

    def write_staged(self, role: str, metadata: Metadata[Any]) -> Signed:
        """Write metadata that waits for signatures."""
        data = metadata.to_bytes()
        (self.folder / STAGED_DIR).mkdir(exist_ok=True)
        write_atomic(self.folder / STAGED_DIR / f"{role}.json", data.decode())
        return Signed(role, metadata, data)

    def publish(self, signed: Signed) -> None:
        """Write metadata that has all its signatures where boxes look.

        They see it when a timestamp leads to it; until then the staged is what counts.
        """
        version = "" if signed.role == Timestamp.type else f"{signed.version}."
        path = self.folder / METADATA_DIR / f"{version}{signed.role}.json"
        write_atomic(path, signed.data.decode())

    def remove_staged(self, role: str) -> None:
        """Forget staged metadata, once boxes see it."""
        (self.folder / STAGED_DIR / f"{role}.json").unlink(missing_ok=True)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keep other publishers out.

        Raises:
            RepositoryBusyError: one is in it.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / _LOCK).open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as exc:
                msg = f"another process is changing {self.folder}; try again"
                raise RepositoryBusyError(msg) from exc
            yield

    def _expire(self, days: int) -> datetime:
        return self.clock().replace(microsecond=0) + timedelta(days=days)

    def _find_target(self, role: str, path: str) -> TargetFile | None:
        try:
            found: TargetFile | None = self.get_current(role).metadata.signed.targets.get(path)
        except ReleaseRepositoryError:
            return None
        return found

    def _check_publisher(self, name: str, version: str, publisher: str) -> None:
        if publisher == Targets.type:
            self.get_current(publisher)
            return
        delegation = find_delegations(self.get_current(Targets.type)).get(publisher)
        if delegation is None:
            raise ReleaseRepositoryError(f"there is no publisher {publisher!r}")
        if not delegation.is_delegated_path(name_target(name, version)):
            allowed = ", ".join(path.split("/")[0] for path in delegation.paths or [])
            msg = f"{publisher} may sign {allowed}, and {name!r} is none of these"
            raise ReleaseRepositoryError(msg)

    def _iter_blobs(self, name: str, version: str, folder: Path) -> Iterator[ReleaseFile]:
        """Take the files of a version folder over, and yield what to say of each."""
        manifest = read_manifest(folder)
        verify_files(manifest, folder)
        released = manifest.model_copy(update={"name": name, "version": version})
        digests = {entry.file: entry.sha256 for entry in manifest.artifacts} | manifest.files
        with tempfile.TemporaryDirectory(prefix="edgeward-release-") as scratch:
            write_manifest(released, Path(scratch))
            source = Path(scratch) / MANIFEST_FILE
            yield self._take(MANIFEST_FILE, source, compute_sha256(source))
        for file, digest in sorted(digests.items()):
            yield self._take(file, folder / file, digest)

    def _take(self, name: str, source: Path, sha256: str) -> ReleaseFile:
        """Copy a file below `blobs/`, and write where it may be cut.

        Raises:
            DigestMismatchError: it changed since it was looked at.
        """
        blob = self.folder / BLOBS_DIR / sha256
        if not blob.exists():
            part = blob.with_name(f".{sha256}.{os.getpid()}.part")
            try:
                with source.open("rb") as given, part.open("wb") as file:
                    shutil.copyfileobj(given, file, 1 << 20)
                    file.flush()
                    os.fsync(file.fileno())
                if compute_sha256(part) != sha256:
                    msg = f"{name} changed while it was read; try again"
                    raise DigestMismatchError(msg)
                part.replace(blob)
                fsync_dir(blob.parent)
            finally:
                part.unlink(missing_ok=True)
        size_bytes = blob.stat().st_size
        index = self.folder / CHUNKS_DIR / f"{sha256}.json"
        if size_bytes >= MIN_INDEXED_BYTES and not index.exists():
            write_chunk_index(blob, index)
        return ReleaseFile(path=name, sha256=sha256, size_bytes=size_bytes)


def find_delegations(targets: Signed) -> dict[str, DelegatedRole]:
    """Return the publishers that targets metadata delegates to, first ones first."""
    delegations = targets.metadata.signed.delegations
    return dict(delegations.roles or {}) if delegations is not None else {}


def _serialize(document: ReleaseDocument) -> bytes:
    data = document.model_dump(mode="json", by_alias=True)
    return (json.dumps(data, indent=1, ensure_ascii=False) + "\n").encode()
