"""Whom this box trusts for a release, and whether it is what they signed last.

Owns the trust folder (a cache of verified TUF metadata) and the floors below which
nothing is taken any more. Never fetches a blob and installs nothing.

    shipped root ─▶ newer roots ─▶ timestamp ─▶ snapshot ─▶ targets ─▶ publisher
                                                                          │
          floors hold? ◀─ nothing expired? ◀─ release.json ◀── its sha256 ┘

Invariants: the chain always begins at the root that the box was given, never at one that
was cached, so a torn, wiped or planted cache costs a download and no trust. The clock can
only go forward: what counts is the latest of the clock, the time floor, and the time at
which the timestamp says it was signed. No role's version goes below its floor, unless a
newer root has changed the keys of timestamp or snapshot, as TUF recovers from versions
that a thief has driven up. Each cached file is the old or the new one, also after a power
cut. One process at a time uses a folder.

Source: TUF specification 1.0.33, section 5; tuf 7.0.1 (`tuf.ngclient`), whose updater is
used for metadata, with what it leaves to its user added here: docs/adr/0021-tuf.md.
"""

import contextlib
import fcntl
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

from tuf.api.exceptions import DownloadHTTPError, ExpiredMetadataError, RepositoryError
from tuf.api.metadata import Metadata, Root, Signed, Snapshot, TargetFile, Timestamp
from tuf.ngclient import FetcherInterface, Updater, UpdaterConfig

from agent.fileio import write_atomic
from agent.manifest import NAME_PATTERN
from agent.release import (
    METADATA_DIR,
    RELEASE_FILE,
    RELEASE_MAX_BYTES,
    TARGETS_DIR,
    ReleaseDocument,
    name_target,
    parse_release,
)
from worker.errors import (
    ReleaseExpiredError,
    ReleaseUnknownError,
    SourceMissingError,
    TrustBusyError,
    TrustError,
    TrustFolderError,
)
from worker.update.sources import METADATA_MAX_BYTES, ReleaseSource

SIGNED_AT = "x-edgeward-signed-at"
"""Key in the signed part of the timestamp: when it was signed, RFC 3339 in UTC."""
STALE_AFTER = timedelta(days=30)
"""A timestamp older than this still holds if it says so, but somebody should know."""
MAX_VERSION = (1 << 53) - 1
"""Of any metadata: what JSON and SQLite carry exactly."""

_CACHE = "metadata"
_LOCK = ".lock"
_MAX_DELEGATIONS = 64


@dataclass(frozen=True, slots=True)
class Floors:
    """Below what nothing is taken any more. Kept by the caller, where a power cut cannot reach.

    Whoever keeps them must store those of a `VerifiedRelease` before installing it.
    """

    time_ms: int = 0
    """The latest time that was ever given or signed, Unix epoch."""
    versions: Mapping[str, int] = field(default_factory=dict)
    """Highest version seen of each role, by its name, such as `timestamp` or a publisher's."""


@dataclass(frozen=True, slots=True)
class VerifiedRelease:
    """A release that this box may install, and how fresh that answer is."""

    document: ReleaseDocument
    floors: Floors
    """To be kept, in place of those given."""
    expires_at: datetime
    """When the first of the signatures it rests on is over."""
    signed_at: datetime | None
    """When the timestamp was signed; None where its signer does not say."""
    is_stale: bool
    """Whether the timestamp is older than `STALE_AFTER`, as on a stick from last year."""


class Trust:
    """Verifies releases against one root.

    Args:
        folder: of the cache; made if it is not there.
        root: the root metadata that this box was given, any version of it.
        floors: as they were returned last.

    Raises:
        TrustError: what was given as the root is none.
    """

    def __init__(self, folder: Path, root: bytes, floors: Floors) -> None:
        try:
            is_root = Metadata.from_bytes(root).signed.type == Root.type
        except RepositoryError:
            is_root = False
        if not is_root:
            msg = "the root that this box was given is no root metadata of a release repository"
            raise TrustError(msg)
        self._folder = folder
        self._root = root
        self.floors = floors
        """The floors as of now; raised by each release that is verified."""

    def verify_release(
        self, source: ReleaseSource, name: str, version: str, now: datetime
    ) -> VerifiedRelease:
        """Return a release as its publisher signed it last. Writes the cache.

        Args:
            source: where to read from. It is not trusted.
            name: of the model.
            version: of the model; there is no `latest`.
            now: what the clock says, aware.

        Raises:
            ReleaseUnknownError: nobody trusted for the model has signed such a release.
            ReleaseExpiredError: a signature that it rests on is over.
            TrustError: anything else is not as it must be; the message says what.
            TrustBusyError: another process uses the folder.
            TrustFolderError: the folder cannot be written.
            FetchError: the source gave no answer, or one that may not be used.
            ReleaseError: what was signed is no release document.
        """
        if not (re.fullmatch(NAME_PATTERN, name) and re.fullmatch(NAME_PATTERN, version)):
            msg = f"{name!r} {version!r} cannot be a model and its version"
            raise ReleaseUnknownError(msg)
        with self._lock(), _translate_errors():
            found = self._verify(source, name, version, now)
        self.floors = found.floors
        return found

    def _verify(
        self, source: ReleaseSource, name: str, version: str, now: datetime
    ) -> VerifiedRelease:
        updater = self._open_updater(source, now)
        target = updater.get_targetinfo(name_target(name, version))
        # Before anything else is said: an old repository does not know the newest releases.
        floors = updater.raise_floors()
        if target is None:
            msg = f"nobody whom this box trusts has signed a release {version} of {name}"
            raise ReleaseUnknownError(msg)
        document = _read_document(source, target, name, version)
        signed_at = _find_signed_at(updater.timestamp)
        is_stale = signed_at is not None and updater.now - signed_at > STALE_AFTER
        return VerifiedRelease(document, floors, updater.find_expiry(), signed_at, is_stale)

    def _open_updater(self, source: ReleaseSource, now: datetime) -> "_Updater":
        """Return an updater over the cache; over an empty one, if the cache is damaged."""
        cache = self._folder / _CACHE
        try:
            return self._refresh(source, now)
        except OSError:
            # A folder where a file should be, a bad sector: nothing in it is irreplaceable.
            with contextlib.suppress(FileNotFoundError):
                shutil.rmtree(cache)
        return self._refresh(source, now)

    def _refresh(self, source: ReleaseSource, now: datetime) -> "_Updater":
        cache = self._folder / _CACHE
        cache.mkdir(exist_ok=True)
        updater = _Updater(cache, source, self._root, now, self.floors)
        updater.refresh()
        return updater

    @contextmanager
    def _lock(self) -> Iterator[None]:
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with (self._folder / _LOCK).open("w") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                yield
        except BlockingIOError as exc:
            msg = f"another process is verifying in {self._folder}; try again"
            raise TrustBusyError(msg) from exc
        except OSError as exc:
            msg = f"the trust folder {self._folder} cannot be used: {exc.strerror or exc}"
            raise TrustFolderError(msg) from exc


class _Updater(Updater):
    """tuf's updater with a clock that is given, floors, and files that survive a power cut.

    Leans on private names of tuf 7.0.1, which is pinned for that reason: `_trusted_set`,
    `_load_root`, `_load_timestamp`, `_persist_file`, `_update_root_symlink`. Attacks in
    tests/integration/test_release_attacks.py succeed where one is no longer called.
    """

    def __init__(
        self, cache: Path, source: ReleaseSource, root: bytes, now: datetime, floors: Floors
    ) -> None:
        super().__init__(
            str(cache),
            f"{METADATA_DIR}/",
            fetcher=_Fetcher(source),
            config=UpdaterConfig(
                max_delegations=_MAX_DELEGATIONS,
                targets_max_length=METADATA_MAX_BYTES,
                snapshot_max_length=METADATA_MAX_BYTES,
            ),
            bootstrap=root,
        )
        self._cache = cache
        self._floors = floors
        floor = datetime.fromtimestamp(floors.time_ms / 1000, UTC)
        self.now = max(now.astimezone(UTC), floor)

    @property
    def now(self) -> datetime:
        """The time that expiry is judged by."""
        found: datetime = self._trusted_set.reference_time
        return found

    @now.setter
    def now(self, value: datetime) -> None:
        self._trusted_set.reference_time = value

    @property
    def timestamp(self) -> Timestamp:
        """The verified timestamp."""
        return self._trusted_set.timestamp

    def find_expiry(self) -> datetime:
        """Return when the first of the metadata that was used expires."""
        # Iterating over tuf's mapping gives its values, not its keys.
        loaded: Iterator[Signed] = iter(self._trusted_set)
        return min(signed.expires for signed in loaded)

    def raise_floors(self) -> Floors:
        """Check everything that was loaded against floors and time, and return the new floors.

        Raises:
            ReleaseExpiredError: something is over by the time that the timestamp was signed.
            TrustError: a version is below its floor, or beyond what a version can be.
        """
        if self.find_expiry() <= self.now:
            msg = f"metadata expired at {self.find_expiry():%Y-%m-%d %H:%M} UTC"
            raise ReleaseExpiredError(msg)
        versions = dict(self._floors.versions)
        for role, version in self._iter_versions():
            floor = versions.get(role, 0)
            if not floor <= version <= MAX_VERSION:
                msg = (
                    f"the {role} metadata at the source has version {version}, this box has seen "
                    f"version {floor}: an old state is being played back"
                )
                raise TrustError(msg)
            versions[role] = version
        return Floors(int(self.now.timestamp() * 1000), versions)

    def _iter_versions(self) -> Iterator[tuple[str, int]]:
        found = self._trusted_set
        for signed in (found.root, found.timestamp, found.snapshot):
            yield signed.type, signed.version
        for file, meta in found.snapshot.meta.items():
            role = file.removesuffix(".json")
            # A stolen snapshot key must not set a floor for a role that it does not list.
            if role not in {Root.type, Timestamp.type, Snapshot.type}:
                yield role, meta.version

    def _load_root(self) -> None:
        super()._load_root()
        if self._have_online_keys_changed():
            root = self._floors.versions["root"]
            self._floors = Floors(self._floors.time_ms, {"root": root})
            for role in (Timestamp.type, Snapshot.type):
                (self._cache / f"{role}.json").unlink(missing_ok=True)

    def _have_online_keys_changed(self) -> bool:
        """Say whether the keys of timestamp or snapshot are others than when the floors were set.

        Source: TUF specification 5.3.11, recovery from a fast-forward attack.
        """
        version = self._floors.versions.get("root", 0)
        if version >= self._trusted_set.root.version:
            return False
        try:
            text = (self._cache / "root_history" / f"{version}.root.json").read_bytes()
            before = Metadata[Root].from_bytes(text).signed
        except (OSError, RepositoryError):
            return False
        return _describe_online_keys(before) != _describe_online_keys(self._trusted_set.root)

    def _load_timestamp(self) -> None:
        super()._load_timestamp()
        signed_at = _find_signed_at(self.timestamp)
        if signed_at is not None and signed_at < self.timestamp.expires:
            self.now = max(self.now, signed_at)

    def _persist_file(self, filename: str, data: bytes) -> None:
        path = Path(filename)
        with contextlib.suppress(FileNotFoundError):
            if path.stat().st_size == len(data) and path.read_bytes() == data:
                return
        # JSON, or it would not have been verified.
        write_atomic(path, data.decode())

    def _update_root_symlink(self) -> None:
        """Leave out the link: the chain begins at the root that was given, never at this one."""


class _Fetcher(FetcherInterface):
    """Reads metadata for tuf from a source."""

    def __init__(self, source: ReleaseSource) -> None:
        self._source = source

    def _fetch(self, url: str) -> Iterator[bytes]:
        raise NotImplementedError(url)

    def download_bytes(self, url: str, max_length: int) -> bytes:
        """Return a metadata file.

        Raises:
            DownloadHTTPError: there is none; to tuf this is how the newest root is known.
            FetchError: it cannot be read, or is longer than `max_length`.
        """
        try:
            return self._source.read(url, max_length)
        except SourceMissingError as exc:
            raise DownloadHTTPError(str(exc), 404) from exc


def _read_document(
    source: ReleaseSource, target: TargetFile, name: str, version: str
) -> ReleaseDocument:
    digest = target.hashes.get("sha256")
    if digest is None or not re.fullmatch(r"[0-9a-f]{64}", digest):
        raise TrustError(f"the release {version} of {name} is signed without a sha256")
    path = f"{TARGETS_DIR}/{name}/{version}/{digest}.{RELEASE_FILE}"
    text = source.read(path, min(target.length, RELEASE_MAX_BYTES))
    target.verify_length_and_hashes(text)
    document = parse_release(text)
    if (document.name, document.version) != (name, version):
        msg = (
            f"asked for {name} {version}, but what is signed in its place is "
            f"{document.name} {document.version}"
        )
        raise TrustError(msg)
    return document


def _describe_online_keys(root: Root) -> list[tuple[int, list[str]]]:
    roles = [root.roles[role] for role in (Timestamp.type, Snapshot.type)]
    return [(role.threshold, sorted(role.keyids)) for role in roles]


def _find_signed_at(signed: Signed) -> datetime | None:
    """Return when the timestamp was signed, by its own words, which are signed as well."""
    text = signed.unrecognized_fields.get(SIGNED_AT)
    try:
        found = datetime.fromisoformat(text) if isinstance(text, str) else None
    except ValueError:
        return None
    return found.astimezone(UTC) if found is not None and found.tzinfo is not None else None


@contextmanager
def _translate_errors() -> Iterator[None]:
    """Turn what tuf raises into errors of ours."""
    try:
        yield
    except ExpiredMetadataError as exc:
        raise ReleaseExpiredError(str(exc)) from exc
    except RepositoryError as exc:
        raise TrustError(f"the metadata at the source is not to be trusted: {exc}") from exc
    except DownloadHTTPError as exc:
        raise SourceMissingError(str(exc)) from exc
