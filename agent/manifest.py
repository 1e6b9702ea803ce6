"""The manifest: what one version of a model is, as written on disk.

Owns the schema of `manifest.json` and its reading and checking. Never loads a
model. The in-memory form is frozen; `ArtifactSpec` and `TensorSpec` of
`platforms.artifact` are built from it for selection and the runtimes.

Invariants: every file named is a plain name inside the version's folder, and
unknown keys are refused, so that a misspelt key is never silently ignored.
"""

import hashlib
import json
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from agent.errors import DigestMismatchError, ManifestError
from platforms.artifact import ArtifactFormat, ArtifactSpec, Datatype, Precision, TensorSpec
from platforms.spec import AcceleratorKind, Arch

SCHEMA = "edgeward.manifest/v1"
MANIFEST_FILE = "manifest.json"
MANIFEST_MAX_BYTES = 1 << 20
NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$"


def _check_relative(name: str) -> str:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or not path.parts or "\\" in name:
        msg = f"{name!r} must be a path inside the version's folder"
        raise ValueError(msg)
    return name


def _check_other(name: str) -> str:
    if PurePosixPath(name) == PurePosixPath(MANIFEST_FILE):
        msg = "the manifest does not list itself"
        raise ValueError(msg)
    return name


SafePath = Annotated[str, Field(min_length=1, max_length=255), AfterValidator(_check_relative)]
"""Of a file inside a version's folder."""
FileName = Annotated[SafePath, AfterValidator(_check_other)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class TensorEntry(_Strict):
    """One input or output of the model; −1 marks a free axis."""

    name: str = Field(min_length=1)
    datatype: Datatype
    shape: tuple[int, ...]

    def to_spec(self) -> TensorSpec:
        """Return the platform layer's form."""
        return TensorSpec(self.name, self.datatype, self.shape)


class Tolerance(_Strict):
    """How far answers may be from a reference and still be right.

    A measure that an output does not have (a best class, where it has no classes) is passed over;
    an output to which none applies needs 20 dB (`platforms.parity.FALLBACK_SQNR_DB`).
    """

    min_agreement: float | None = Field(default=0.99, ge=0, le=1)
    """Share of rows with the same best class."""
    min_top_5: float | None = Field(default=None, ge=0, le=1)
    min_sqnr_db: float | None = None
    max_abs: float | None = Field(default=None, ge=0)


class Golden(_Strict):
    """Inputs with the answers that the publisher vouches for; both are among the `files`.

    `.npz` files with one array per tensor, by its name, axis 0 the rows.
    """

    inputs: FileName
    outputs: FileName
    tolerance: Tolerance = Tolerance()


class Requirements(_Strict):
    """What an artifact needs of the box beyond a runtime that reads its format."""

    arch: tuple[Arch, ...] = ()
    cpu_flags: tuple[str, ...] = ()
    accelerator: AcceleratorKind | None = None
    min_memory_mb: int | None = Field(default=None, ge=1)


class ArtifactEntry(_Strict):
    """One file that realises the model version."""

    file: FileName
    format: ArtifactFormat
    precision: Precision
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    size_bytes: int = Field(ge=1)
    requires: Requirements = Requirements()
    tolerance: Tolerance | None = None
    """In place of the golden set's, for one artifact."""

    def to_spec(self) -> ArtifactSpec:
        """Return the platform layer's form."""
        return ArtifactSpec(
            file=self.file,
            format=self.format,
            precision=self.precision,
            size_bytes=self.size_bytes,
            sha256=self.sha256,
            requires_arch=tuple(arch.value for arch in self.requires.arch),
            requires_cpu_flags=self.requires.cpu_flags,
            requires_accelerator=self.requires.accelerator and self.requires.accelerator.value,
            min_memory_mb=self.requires.min_memory_mb,
        )


class Step(_Strict):
    """One named step of pre- or post-processing with its parameters."""

    name: str = Field(min_length=1)
    params: dict[str, Any] = Field(default_factory=dict)


class QueueRules(_Strict):
    """How long requests may wait for their turn, and how many."""

    timeout_s: float = Field(default=0.0, ge=0)
    """Longest wait; 0 for no limit."""
    timeout_action: Literal["reject", "delay"] = "reject"
    """`delay`: a request that waited too long runs after all others instead of failing."""
    allow_timeout_override: bool = False
    """Whether a request may ask for a shorter wait."""
    max_queue_size: int = Field(default=0, ge=0)
    """Most requests that wait; 0 for no limit."""


class WarmupInput(_Strict):
    """What a warm-up run feeds to one input."""

    datatype: Datatype
    shape: tuple[int, ...]
    """Without the batch axis."""
    source: Literal["zero", "random", "file"] = "zero"
    file: FileName | None = None
    """Raw little-endian tensor data, for the source `file`; one of the manifest's `files`."""

    @model_validator(mode="after")
    def _check(self) -> "WarmupInput":
        if any(axis < 1 for axis in self.shape):
            msg = "the shape of a warm-up input has no free or empty axis"
            raise ValueError(msg)
        if (self.source == "file") != (self.file is not None):
            msg = "`file` goes with the source `file`, and only with it"
            raise ValueError(msg)
        return self


class Warmup(_Strict):
    """One run before a version takes requests."""

    name: str = Field(min_length=1)
    rows: int = Field(default=1, ge=1)
    count: int = Field(default=1, ge=1)
    """How often it runs."""
    inputs: dict[str, WarmupInput] = Field(min_length=1)


class VersionPolicy(_Strict):
    """Which versions are served by number; exactly one of the three."""

    latest: int | None = Field(default=None, ge=1)
    all: Literal[True] | None = None
    specific: tuple[int, ...] | None = Field(default=None, min_length=1)

    @model_validator(mode="after")
    def _check(self) -> "VersionPolicy":
        if sum(item is not None for item in (self.latest, self.all, self.specific)) != 1:
            msg = "a version policy is one of latest, all, specific"
            raise ValueError(msg)
        return self


class Serving(_Strict):
    """How the model is served; a key that is left out is config.pbtxt's, or the engine's."""

    max_rows: int | None = Field(default=None, ge=0, le=1 << 20)
    """Most rows in one run; 0: nothing is stacked."""
    preferred_rows: tuple[Annotated[int, Field(ge=1)], ...] = ()
    max_queue_delay_s: float = Field(default=0.0, ge=0, le=60)
    """How long a request may wait for others to fill a batch."""
    preserve_ordering: bool = False
    priority_levels: int = Field(default=0, ge=0, le=1 << 16)
    default_priority: int = Field(default=0, ge=0)
    queue: QueueRules = QueueRules()
    priority_queues: dict[Annotated[int, Field(ge=1)], QueueRules] = Field(default_factory=dict)
    """Rules of single priority levels, in place of `queue`."""
    instances: int | None = Field(default=None, ge=1, le=256)
    """Runs at the same time; left out: as many as pay on this box."""
    response_cache: bool = False
    warmup: tuple[Warmup, ...] = ()
    version_policy: VersionPolicy | None = None
    parameters: dict[str, str] = Field(default_factory=dict)


class Manifest(_Strict):
    """One version of a model: tensors, artifacts in the publisher's order, processing."""

    schema_: Literal["edgeward.manifest/v1"] = Field(alias="schema")
    name: str = Field(pattern=NAME_PATTERN)
    version: str = Field(pattern=NAME_PATTERN)
    """The release the publisher calls it by, such as `2.3.0`."""
    description: str = ""
    license: str = ""
    inputs: tuple[TensorEntry, ...] = Field(min_length=1)
    outputs: tuple[TensorEntry, ...] = Field(min_length=1)
    preprocess: Step = Step(name="tensor")
    postprocess: tuple[Step, ...] = ()
    artifacts: tuple[ArtifactEntry, ...] = Field(min_length=1)
    files: dict[FileName, str] = Field(default_factory=dict)
    """Other files of the version (labels, …) with their sha256."""
    objective: Literal["latency_p95", "throughput", "memory", "energy"] = "latency_p95"
    serving: Serving | None = None
    """Batching, queues, instances, response cache, warm-up."""
    golden: Golden | None = None
    """What proves the version right on a box before it serves there."""

    @model_validator(mode="after")
    def _check_golden(self) -> "Manifest":
        if self.golden is not None:
            for name in (self.golden.inputs, self.golden.outputs):
                if name not in self.files:
                    msg = f"golden: {name!r} is not among the files"
                    raise ValueError(msg)
        return self

    def artifact_specs(self) -> tuple[ArtifactSpec, ...]:
        """Return the artifacts in the publisher's order, as selection sees them."""
        return tuple(entry.to_spec() for entry in self.artifacts)


def parse_manifest(text: bytes | str) -> Manifest:
    """Check the text of a manifest and return it.

    Raises:
        ManifestError: it is too large, no JSON, of another schema, or has a bad or unknown key.
    """
    if len(text) > MANIFEST_MAX_BYTES:
        msg = f"the manifest has {len(text)} bytes; at most {MANIFEST_MAX_BYTES} are read"
        raise ManifestError(msg)
    try:
        return Manifest.model_validate_json(text)
    except ValidationError as exc:
        first = exc.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "(whole document)"
        msg = f"manifest: {where}: {first['msg']} ({exc.error_count()} problem(s) in all)"
        raise ManifestError(msg) from exc


def read_manifest(folder: Path) -> Manifest:
    """Read and check `folder/manifest.json`.

    Raises:
        ManifestError: it is missing, unreadable or not valid.
    """
    try:
        text = (folder / MANIFEST_FILE).read_bytes()
    except OSError as exc:
        msg = f"{folder / MANIFEST_FILE} cannot be read: {exc.strerror}"
        raise ManifestError(msg) from exc
    return parse_manifest(text)


def write_manifest(manifest: Manifest, folder: Path) -> None:
    """Write `manifest` to `folder/manifest.json` (not flushed: staging flushes the tree)."""
    data = manifest.model_dump(mode="json", by_alias=True, exclude_defaults=True)
    text = json.dumps({"schema": SCHEMA, **data}, indent=2, ensure_ascii=False)
    (folder / MANIFEST_FILE).write_text(text + "\n", encoding="utf-8")


def compute_sha256(path: Path) -> str:
    """Return the sha256 of a file as lower-case hex, read in 1 MiB pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def verify_files(manifest: Manifest, folder: Path) -> None:
    """Check that every file of the manifest is there with its size and digest.

    Raises:
        ManifestError: a file is missing or is no regular file inside the folder.
        DigestMismatchError: a size or sha256 differs.
    """
    expected: dict[str, tuple[str, int | None]] = {
        entry.file: (entry.sha256, entry.size_bytes) for entry in manifest.artifacts
    }
    expected.update({name: (digest, None) for name, digest in manifest.files.items()})
    for name, (digest, size_bytes) in expected.items():
        path = folder / name
        if path.is_symlink() or not path.is_file():
            msg = f"{name} is named by the manifest of {manifest.name} but is no file in {folder}"
            raise ManifestError(msg)
        if size_bytes is not None and path.stat().st_size != size_bytes:
            msg = f"{name} has {path.stat().st_size} bytes, its manifest says {size_bytes}"
            raise DigestMismatchError(msg)
        if compute_sha256(path) != digest:
            msg = f"{name} has another sha256 than its manifest says: fetch or add it again"
            raise DigestMismatchError(msg)
