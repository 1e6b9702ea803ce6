"""A release: what a publisher signs of one version of a model, as it travels.

Owns the schema of `release.json` and the layout of a release repository, the folder
that any static web server can serve. Never fetches, signs or installs.

    metadata/                              TUF: root, targets, snapshot, timestamp, publishers
    targets/<name>/<version>/<hash>.release.json   the only TUF targets
    blobs/<sha256>                         every file of every release, by its content
    chunks/<sha256>.json                   where a blob may be cut: a hint, and not signed

Invariants: what `release.json` names is verified by size and sha256 wherever it came
from, so nothing below `blobs/` and `chunks/` has to be trusted; one of its files is the
version's `manifest.json`.

Source: docs/releases.md.
"""

import itertools
import re
import tarfile
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from agent.errors import ReleaseError
from agent.manifest import MANIFEST_FILE, NAME_PATTERN, SafePath

SCHEMA = "edgeward.release/v1"
RELEASE_FILE = "release.json"
RELEASE_MAX_BYTES = 1 << 20
METADATA_DIR = "metadata"
TARGETS_DIR = "targets"
BLOBS_DIR = "blobs"
CHUNKS_DIR = "chunks"
_BUNDLE_MEMBERS_MAX = 50_000
BUNDLES = "_releases"
"""Folder of the inbox: bundle files in it become update jobs."""
BUNDLE_SUFFIX = ".edgeward"
"""Of a file that holds metadata, one release and its blobs, for a USB stick."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ReleaseFile(_Strict):
    """One file of a release."""

    path: SafePath
    """Inside the version's folder."""
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    size_bytes: int = Field(ge=0)


class ReleaseDocument(_Strict):
    """One version of a model as a publisher released it."""

    schema_: Literal["edgeward.release/v1"] = Field(alias="schema")
    name: str = Field(pattern=NAME_PATTERN)
    version: str = Field(pattern=NAME_PATTERN)
    files: tuple[ReleaseFile, ...] = Field(min_length=1, max_length=10_000)

    @model_validator(mode="after")
    def _check(self) -> "ReleaseDocument":
        paths = [file.path for file in self.files]
        if len(set(paths)) != len(paths):
            msg = "a file is named twice"
            raise ValueError(msg)
        if MANIFEST_FILE not in paths:
            msg = f"{MANIFEST_FILE} is not among the files"
            raise ValueError(msg)
        return self

    def get_file(self, path: str) -> ReleaseFile:
        """Return the file of that path.

        Raises:
            ReleaseError: there is none.
        """
        for file in self.files:
            if file.path == path:
                return file
        msg = f"release {self.name} {self.version} has no file {path!r}"
        raise ReleaseError(msg)


def name_target(name: str, version: str) -> str:
    """Return the TUF target path of a release."""
    return f"{name}/{version}/{RELEASE_FILE}"


def parse_release(text: bytes) -> ReleaseDocument:
    """Check the text of a `release.json` and return it.

    Raises:
        ReleaseError: it is too large, or not valid.
    """
    if len(text) > RELEASE_MAX_BYTES:
        msg = f"{RELEASE_FILE} has {len(text)} bytes; at most {RELEASE_MAX_BYTES} are read"
        raise ReleaseError(msg)
    try:
        return ReleaseDocument.model_validate_json(text)
    except ValidationError as exc:
        first = exc.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "(whole document)"
        msg = f"{RELEASE_FILE}: {where}: {first['msg']}"
        raise ReleaseError(msg) from exc


def find_bundled(path: Path) -> tuple[str, str]:
    """Return model and version that a bundle file says it has; nothing of it is verified here.

    Raises:
        ReleaseError: it is no bundle, or names no release, or several.
    """
    pattern = re.compile(rf"{TARGETS_DIR}/([^/]+)/([^/]+)/[0-9a-f]{{64}}\.{RELEASE_FILE}")
    try:
        with tarfile.open(path, "r:") as bundle:
            names = [member.name for member in itertools.islice(bundle, _BUNDLE_MEMBERS_MAX)]
    except (OSError, tarfile.TarError, EOFError, ValueError) as exc:
        msg = f"{path.name} is no bundle of a release: {exc}"
        raise ReleaseError(msg) from exc
    found = {match.groups() for name in names if (match := pattern.fullmatch(name)) is not None}
    if len(found) != 1:
        msg = f"{path.name} must hold one release, and has {len(found)}"
        raise ReleaseError(msg)
    [(name, version)] = found
    if not all(re.match(NAME_PATTERN, text) for text in (name, version)):
        msg = f"{path.name}: {name[:64]!r} {version[:64]!r} are no names of a model and a version"
        raise ReleaseError(msg)
    return name, version
