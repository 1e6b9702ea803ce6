"""Looking at a release as a box does, from nothing but a root and a source.

Owns no trust: each look begins with an empty trust folder and no floors, so it says what a new
box would say; a box that has seen more may refuse more.
"""

import hashlib
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from agent.release import BLOBS_DIR, ReleaseFile
from worker.errors import WrongHashError, WrongLengthError
from worker.update.sources import ReleaseSource
from worker.update.trust import Floors, Trust, VerifiedRelease

_PIECE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Look:
    """What was found of one release."""

    release: VerifiedRelease
    blobs: int
    """That were read and have size and sha256 as signed."""


def verify_releases(
    source: ReleaseSource,
    root: bytes,
    releases: list[tuple[str, str]],
    now: datetime,
    *,
    with_blobs: bool = True,
) -> Iterator[Look]:
    """Yield each release as it is verified, its blobs included.

    Raises:
        TrustError, FetchError, ReleaseError: a box would refuse it, and why.
    """
    seen: set[str] = set()
    with tempfile.TemporaryDirectory(prefix="edgeward-verify-") as folder:
        trust = Trust(Path(folder), root, Floors())
        for name, version in releases:
            release = trust.verify_release(source, name, version, now)
            files = {file.sha256: file for file in release.document.files} if with_blobs else {}
            for file in files.values():
                if file.sha256 not in seen:
                    _verify_blob(source, file)
                    seen.add(file.sha256)
            yield Look(release, len(files))


def _verify_blob(source: ReleaseSource, file: ReleaseFile) -> None:
    path = f"{BLOBS_DIR}/{file.sha256}"
    digest, count = hashlib.sha256(), 0
    with source.open(path, None, file.size_bytes) as stream:
        while count <= file.size_bytes and (piece := stream.read(_PIECE_BYTES)):
            digest.update(piece)
            count += len(piece)
    if count != file.size_bytes:
        msg = f"{path} ({file.path}) does not have the {file.size_bytes} bytes that are signed"
        raise WrongLengthError(msg)
    if digest.hexdigest() != file.sha256:
        msg = f"{path} ({file.path}) has another sha256 than the one that is signed"
        raise WrongHashError(msg)
