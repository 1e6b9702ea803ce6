"""A publisher with keys and a repository, thieves of its keys, and a box that looks at it."""

import hashlib
import io
import os
import shutil
import tarfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from tuf.api.metadata import Metadata, MetaFile, Snapshot, Targets, Timestamp

from agent.manifest import Manifest, write_manifest
from console.release.keys import KeyRing
from console.release.repository import ReleaseRepository
from console.release.signing import SigningReport, sign_repository
from worker.update.sources import (
    BundleSource,
    FolderReleaseSource,
    HttpReleaseSource,
    ReleaseSource,
)
from worker.update.trust import Floors, Trust, VerifiedRelease

MEMORY = next((path for path in ("/dev/shm",) if os.access(path, os.W_OK)), None)
"""Where a flush costs nothing, as these tests flush thousands of times; None: the usual place."""
START = datetime(2026, 6, 1, 12, tzinfo=UTC)
DAYS = {"root": 365, "targets": 365, "snapshot": 30, "timestamp": 30}


def write_version_folder(folder: Path, content: bytes = b"weights") -> Path:
    """Write a version folder whose one artifact has that content; no runtime would load it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.onnx").write_bytes(content)
    (folder / "labels.txt").write_text("zero\none\n")
    document = {
        "schema": "edgeward.manifest/v1",
        "name": "unnamed",
        "version": "0",
        "inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, 4]}],
        "outputs": [{"name": "y", "datatype": "FP32", "shape": [-1, 2]}],
        "artifacts": [
            {
                "file": "model.onnx",
                "format": "onnx",
                "precision": "fp32",
                "sha256": hashlib.sha256(content).hexdigest(),
                "size_bytes": len(content),
            }
        ],
        "files": {"labels.txt": hashlib.sha256(b"zero\none\n").hexdigest()},
    }
    write_manifest(Manifest.model_validate(document), folder)
    return folder


class Publisher:
    """A release repository and the keys to it, with a clock that the test sets.

    Args:
        home: of both; a repository that is there already is used as it is.
        days: how long signatures hold.
    """

    def __init__(self, home: Path, days: Mapping[str, int] = DAYS) -> None:
        self.home = home
        self.folder = home / "repo"
        self.keys = home / "keys"
        self.now = START
        self.repository = ReleaseRepository(self.folder, lambda: self.now)
        if not self.folder.exists():
            self.repository.create(self.ring, root_keys=3, root_threshold=2, days=days)
            self.sign()

    @property
    def ring(self) -> KeyRing:
        """All keys."""
        return KeyRing([self.keys], self.folder)

    def take_keys(self, *names: str) -> KeyRing:
        """Return a ring of copies of some keys."""
        folder = self.home / "-".join(("ring", *names))
        folder.mkdir(exist_ok=True)
        for name in names:
            shutil.copy(self.keys / f"{name}.pem", folder)
        return KeyRing([folder])

    @property
    def root(self) -> bytes:
        """The first root, as boxes are given it."""
        return (self.folder / "metadata" / "1.root.json").read_bytes()

    def pass_days(self, days: float) -> None:
        """Let time pass for the publisher."""
        self.now += timedelta(days=days)

    def sign(self, ring: KeyRing | None = None) -> SigningReport:
        """Sign and publish what is there, with all keys or with those given."""
        with self.repository.lock():
            return sign_repository(self.repository, ring or self.ring)

    def release(self, name: str, version: str, publisher: str = "targets") -> None:
        """Publish a release."""
        content = f"{name} {version}".encode() * 1000
        folder = write_version_folder(self.home / "versions" / name / version, content)
        self.repository.add_release(name, version, folder, publisher)
        self.sign()

    def delegate(self, publisher: str, pattern: str) -> None:
        """Give a publisher a key of its own."""
        self.repository.delegate(publisher, pattern, self.ring.get_or_create(publisher))
        self.sign()

    def rotate(self, role: str) -> list[str]:
        """Replace all keys of a role; return the old ones' ids."""
        delegator = "root" if role in DAYS else "targets"
        signed = self.repository.get_current(delegator).metadata.signed
        old = list(signed.get_delegated_role(role).keyids)
        ring = self.ring
        new = [ring.create_next(role) for _ in old]
        self.repository.change_keys(role, add=new, remove=old)
        self.sign()
        return old

    def copy(self, name: str) -> Path:
        """Keep the repository as it is now, for somebody to play it back."""
        kept = self.home / name
        shutil.copytree(self.folder, kept)
        return kept


class Thief:
    """Somebody with stolen keys and a mirror of the repository of their own.

    Args:
        mirror: a copy of a repository, that boxes are led to.
        ring: the stolen keys.
    """

    def __init__(self, mirror: Path, ring: KeyRing) -> None:
        self.mirror = mirror
        self._ring = ring
        self._repository = ReleaseRepository(mirror)

    def read(self, role: str) -> Metadata[Any]:
        """Return the newest metadata of a role, to be changed."""
        found = self._repository.find_published(role)
        assert found is not None
        return found.metadata

    def write(self, role: str, metadata: Metadata[Any]) -> bytes:
        """Sign metadata with every stolen key, and put it where boxes look."""
        metadata.signatures.clear()
        for keyid in self._ring.list_keys().values():
            signer = self._ring.find_signer(keyid)
            assert signer is not None
            metadata.sign(signer, append=True)
        data = metadata.to_bytes()
        version = "" if role == Timestamp.type else f"{metadata.signed.version}."
        (self.mirror / "metadata" / f"{version}{role}.json").write_bytes(data)
        return data

    def list_in(self, roles: Mapping[str, bytes], versions: Mapping[str, int] = {}) -> None:
        """Write the snapshot and timestamp that go with new metadata of some roles.

        Args:
            roles: new metadata of targets roles.
            versions: of snapshot and timestamp; else the next ones.
        """
        snapshot: Metadata[Snapshot] = self.read(Snapshot.type)
        snapshot.signed.version = versions.get("snapshot", snapshot.signed.version + 1)
        for role, data in roles.items():
            signed = Metadata[Targets].from_bytes(data).signed
            snapshot.signed.meta[f"{role}.json"] = MetaFile.from_data(
                signed.version, data, ["sha256"]
            )
        written = self.write(Snapshot.type, snapshot)
        timestamp: Metadata[Timestamp] = self.read(Timestamp.type)
        timestamp.signed.version = versions.get("timestamp", timestamp.signed.version + 1)
        timestamp.signed.snapshot_meta = MetaFile.from_data(
            snapshot.signed.version, written, ["sha256"]
        )
        self.write(Timestamp.type, timestamp)


class Box:
    """A device that was given a root, and keeps what it has seen."""

    def __init__(self, folder: Path, root: bytes) -> None:
        self.folder = folder
        self.root = root
        self.floors = Floors()

    def look(
        self,
        source: ReleaseSource,
        name: str = "digits",
        version: str = "1.0.0",
        now: datetime = START,
    ) -> VerifiedRelease:
        """Verify a release as a process that was just started, and keep the floors."""
        found = Trust(self.folder, self.root, self.floors).verify_release(
            source, name, version, now
        )
        self.floors = found.floors
        return found

    def wipe(self) -> None:
        """Lose the cache; the floors are in the ledger."""
        shutil.rmtree(self.folder)

    def list_cached(self) -> list[Path]:
        """Return the files of the cache."""
        return sorted(path for path in (self.folder / "metadata").rglob("*") if path.is_file())


class _Handler(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base's name
        del format, args


@contextmanager
def serve(folder: Path, handler: type[SimpleHTTPRequestHandler] = _Handler) -> Iterator[str]:
    """Serve a folder over HTTP, and yield its address."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=str(folder)))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def pack(folder: Path, path: Path) -> Path:
    """Write all files of a repository, right or wrong, as a bundle; not by the product's code."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for part in ("metadata", "targets", "blobs"):
            for file in sorted((folder / part).rglob("*")):
                if file.is_file():
                    member = tarfile.TarInfo(str(file.relative_to(folder)))
                    member.size = file.stat().st_size
                    with file.open("rb") as content:
                        tar.addfile(member, content)
    return path


def pack_members(path: Path, *members: tuple[tarfile.TarInfo, bytes]) -> Path:
    """Write a tar of any members."""
    with tarfile.open(path, "w") as tar:
        for member, content in members:
            tar.addfile(member, io.BytesIO(content))
    return path


@contextmanager
def lead_to(channel: str, folder: Path) -> Iterator[ReleaseSource]:
    """Yield the source that a box reads a repository from.

    Args:
        channel: `http`, `folder` or `bundle`.
        folder: of the repository.
    """
    if channel == "http":
        with serve(folder) as address:
            yield HttpReleaseSource(address)
    elif channel == "folder":
        yield FolderReleaseSource(folder)
    else:
        yield BundleSource(pack(folder, folder.with_suffix(".edgeward")))


Lead = Callable[[Path], ReleaseSource]
