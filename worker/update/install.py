"""From a release's name to an inactive version in the repository: trust, fetch, install.

Owns the order: whom it is from, which of its files this box may need, their bytes, one version
folder. A release's artifacts that cannot run here are not fetched, and the installed manifest does
not name them.

Invariants: nothing is installed that the box's root does not vouch for; what a kill leaves behind
is a cache; nothing here is active.
"""

import logging
import os
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from agent.config import Settings
from agent.errors import AgentError, ReleaseError
from agent.manifest import (
    MANIFEST_FILE,
    Manifest,
    parse_manifest,
    read_manifest,
    write_manifest,
)
from agent.release import ReleaseDocument
from agent.repository import ModelRepository, ModelVersion
from platforms.runtimes.registry import RUNTIME_FORMATS
from platforms.selection import Verdict, list_pairs
from platforms.spec import PlatformSpec
from worker.errors import TrustError
from worker.update.fetch import BlobFetcher, FetchLimits, FetchReport
from worker.update.partfile import remove_parts
from worker.update.sources import BundleSource, ReleaseSource, open_release_source
from worker.update.trust import Floors, Trust

log = logging.getLogger(__name__)

_ABANDONED_S = 7 * 86_400.0
"""A download that has not gone on for so long is given up: its bytes go."""

Progress = Callable[[int, int], None]
"""Bytes done, bytes in all; may raise to end the fetch."""


@dataclass(frozen=True)
class Installed:
    """A version that was installed, and what is to be remembered of its signatures."""

    version: ModelVersion
    floors: Floors
    is_stale: bool
    report: FetchReport


class Installer:
    """Installs releases on this box.

    Args:
        settings: of the box.
        spec: what its artifacts must fit.
    """

    def __init__(self, settings: Settings, spec: PlatformSpec) -> None:
        self._settings = settings
        self._spec = spec
        self._repository = ModelRepository(settings.models_dir)

    def install(
        self,
        name: str,
        release: str,
        floors: Floors,
        progress: Progress,
        bundle: Path | None = None,
    ) -> Installed:
        """Verify, fetch and install a release; blocks for as long as that takes.

        Args:
            name: of the model.
            release: its version.
            floors: of trust, as the ledger has them.
            progress: told of bytes.
            bundle: the file it is in; None: the box's source has it.

        Raises:
            TrustError: nobody whom this box trusts vouches for it, or the box trusts nobody yet.
            FetchError: it could not be fetched.
            ReleaseError, ManifestError: what was signed is no version of a model.
        """
        source = self._open(bundle)
        trust = Trust(self._settings.trust_dir, self._read_root(), floors)
        verified = trust.verify_release(source, name, release, datetime.now(UTC))
        if verified.is_stale:
            signed_at = verified.signed_at
            log.warning("%s %s: its source was signed last at %s", name, release, signed_at)
        fetcher = self._build_fetcher(source)
        first = fetcher.fetch_release(verified.document, [MANIFEST_FILE])
        manifest = self._read_manifest(verified.document, first.files[MANIFEST_FILE])
        kept = self._trim(manifest)
        wanted = [entry.file for entry in kept.artifacts] + list(kept.files)
        report = fetcher.fetch_release(
            verified.document,
            wanted,
            self._list_old_files(name),
            progress=lambda done, total, _fetched: progress(done, total),
        )
        version = self._add(kept, report)
        remove_parts(self._settings.models_dir, min_age_s=_ABANDONED_S)
        return Installed(version, verified.floors, verified.is_stale, report)

    def _open(self, bundle: Path | None) -> ReleaseSource:
        if bundle is not None:
            return BundleSource(bundle)
        rules = self._settings.updates
        if rules.url is None:
            msg = "no source of releases is set: set updates.url, or use a bundle file"
            raise ReleaseError(msg)
        return open_release_source(rules.url, allow_plain=rules.allow_plain, ca_file=rules.ca_file)

    def _read_root(self) -> bytes:
        path = self._settings.trust_root_file
        try:
            return path.read_bytes()
        except OSError as exc:
            msg = (
                f"this box trusts nobody yet: put the publisher's root metadata (1.root.json of "
                f"its repository) at {path} ({exc.strerror})"
            )
            raise TrustError(msg) from exc

    def _build_fetcher(self, source: ReleaseSource) -> BlobFetcher:
        rules = self._settings.updates
        limits = FetchLimits(reserve_bytes=rules.reserve_bytes, bytes_per_s=rules.bytes_per_s)
        return BlobFetcher(self._settings.models_dir, source, limits)

    @staticmethod
    def _read_manifest(document: ReleaseDocument, path: Path) -> Manifest:
        manifest = parse_manifest(path.read_bytes())
        if (manifest.name, manifest.version) != (document.name, document.version):
            msg = (
                f"the manifest of release {document.name} {document.version} says that it is "
                f"{manifest.name} {manifest.version}"
            )
            raise ReleaseError(msg)
        return manifest

    def _trim(self, manifest: Manifest) -> Manifest:
        """Leave out artifacts that no runtime here can run; all of them stay where none can."""
        pairs = list_pairs(manifest.artifact_specs(), self._spec, RUNTIME_FORMATS)
        usable = {pair.artifact.file for pair in pairs if pair.verdict is Verdict.COMPATIBLE}
        kept = tuple(entry for entry in manifest.artifacts if entry.file in usable)
        # Staging then says of each why it cannot run.
        return manifest if not kept else manifest.model_copy(update={"artifacts": kept})

    def _list_old_files(self, name: str) -> Sequence[Path]:
        """Return files that the new ones may be like: those of the versions that are here."""
        found: list[Path] = []
        with suppress(AgentError):
            for version in reversed(self._repository.list_versions(name)):
                files = (path for path in version.folder.rglob("*") if path.is_file())
                found += [path for path in files if path.name != MANIFEST_FILE]
        return found

    def _find_same(self, manifest: Manifest) -> ModelVersion | None:
        """Return the version that is just this one: a try before this one got so far."""
        with suppress(AgentError):
            found = self._repository.get_version(manifest.name, manifest.version)
            if read_manifest(found.folder) == manifest:
                return found
        return None

    def _add(self, manifest: Manifest, report: FetchReport) -> ModelVersion:
        known = self._find_same(manifest)
        if known is not None:
            return known
        models = self._settings.models_dir
        with tempfile.TemporaryDirectory(prefix=".install-", dir=models) as name:
            folder = Path(name)
            for path, blob in report.files.items():
                target = folder / path
                target.parent.mkdir(parents=True, exist_ok=True)
                # A second name: nobody's clean-up takes the blob away meanwhile.
                os.link(blob, target)
            write_manifest(manifest, folder)
            return self._repository.add(folder, activate=False)


def read_floors(document: object) -> Floors:
    """Return floors from a task's JSON; none where it has none."""
    if not isinstance(document, dict):
        return Floors()
    versions = {str(role): int(version) for role, version in document["versions"].items()}
    return Floors(int(document["time_ms"]), versions)


def describe_floors(floors: Floors) -> dict[str, object]:
    """Return the JSON form of floors."""
    return {"time_ms": floors.time_ms, "versions": dict(floors.versions)}
