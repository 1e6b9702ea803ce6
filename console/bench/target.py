"""What is measured: a model version, from the repository, a folder, or one bare file.

Owns the reading of what a person typed: `name`, `name@version`, `name@version:artifact`, or a
path. Loads no model.

Invariants: what is on disk is what the manifest says (every file's digest is checked).
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from agent.config import Settings
from agent.manifest import (
    MANIFEST_FILE,
    Manifest,
    compute_sha256,
    read_manifest,
    verify_files,
)
from agent.repository import ModelRepository
from console.errors import InputFileError
from platforms.artifact import ArtifactFormat, ArtifactSpec, Precision
from platforms.detect import detect_platform
from platforms.runtimes.registry import RUNTIME_FORMATS
from platforms.selection import Candidate, Verdict, select_artifact
from platforms.spec import PlatformSpec

_FORMATS = {
    ".onnx": ArtifactFormat.ONNX,
    ".tflite": ArtifactFormat.TFLITE,
    ".xml": ArtifactFormat.OPENVINO,
    ".pt": ArtifactFormat.TORCHSCRIPT,
    ".pt2": ArtifactFormat.TORCH_EXPORT,
    ".mlpackage": ArtifactFormat.COREML,
}
"""Of a bare file, by its suffix."""


@dataclass(frozen=True)
class Target:
    """A model version to measure."""

    name: str
    version: str | None
    """Its number in the repository; None for a folder or a file."""
    release: str | None
    """The publisher's name for it; None for a bare file."""
    folder: Path
    artifacts: tuple[ArtifactSpec, ...]
    manifest: Manifest | None
    """None for a bare file."""
    digest: str
    """sha256 over all its files' digests."""

    @property
    def label(self) -> str:
        """Return what a person calls it."""
        return f"{self.name}@{self.version or self.release}" if self.release else self.name


def find_target(settings: Settings, text: str, version: str | None = None) -> Target:
    """Return the model that a person named; a path wins over a model of the same name.

    Args:
        settings: of this box, for its repository.
        text: `name`, `name@version`, or the path of a version folder or of a model file.
        version: number or release, if it was given apart.

    Raises:
        InputFileError: it is a path, but of nothing that holds a model.
        ModelNotFoundError, VersionNotFoundError: the repository has no such thing.
        ManifestError, DigestMismatchError: the folder is not what its manifest says.
    """
    path = Path(text)
    if path.is_dir() and path.suffix not in _FORMATS and (path / MANIFEST_FILE).is_file():
        return _read_folder(path.resolve(), None)
    if path.suffix in _FORMATS and path.exists():
        return _read_file(path.resolve())
    if "/" in text or path.suffix in _FORMATS:
        what = "is no model" if path.exists() else "does not exist"
        known = ", ".join(_FORMATS)
        msg = f"{text} {what}: give a folder with {MANIFEST_FILE}, or a file of {known}"
        raise InputFileError(msg)
    name, _, at = text.partition("@")
    found = ModelRepository(settings.models_dir).get_version(name, version or at or None)
    return _read_folder(found.folder, str(found.number))


def find_side(settings: Settings, text: str) -> tuple[Target, str | None]:
    """Return a target and the artifact that was named behind a colon, or None.

    Raises:
        InputFileError: the model has no such artifact.
        AgentError: as `find_target`.
    """
    name, colon, artifact = text.rpartition(":")
    if not colon or Path(text).exists():
        return find_target(settings, text), None
    target = find_target(settings, name)
    if artifact not in {item.file for item in target.artifacts}:
        known = ", ".join(item.file for item in target.artifacts)
        msg = f"{target.label} has no artifact {artifact!r}; it has {known}"
        raise InputFileError(msg)
    return target, artifact


def _read_folder(folder: Path, number: str | None) -> Target:
    manifest = read_manifest(folder)
    verify_files(manifest, folder)
    digests = [entry.sha256 for entry in manifest.artifacts] + [*manifest.files.values()]
    return Target(
        name=manifest.name,
        version=number,
        release=manifest.version,
        folder=folder,
        artifacts=manifest.artifact_specs(),
        manifest=manifest,
        digest=hashlib.sha256("".join(sorted(digests)).encode()).hexdigest(),
    )


def _read_file(path: Path) -> Target:
    digest, size_bytes = _digest(path)
    spec = ArtifactSpec(path.name, _FORMATS[path.suffix], Precision.FP32, size_bytes, digest)
    return Target(
        name=path.name,
        version=None,
        release=None,
        folder=path.parent,
        artifacts=(spec,),
        manifest=None,
        digest=hashlib.sha256(digest.encode()).hexdigest(),
    )


def _digest(path: Path) -> tuple[str, int]:
    """Return sha256 and size of a file, or of all files of a folder that is one model."""
    if path.is_file():
        return compute_sha256(path), path.stat().st_size
    files = sorted(item for item in path.rglob("*") if item.is_file())
    text = "".join(f"{item.relative_to(path)} {compute_sha256(item)}\n" for item in files)
    return hashlib.sha256(text.encode()).hexdigest(), sum(item.stat().st_size for item in files)


def list_candidates(
    target: Target,
    spec: PlatformSpec,
    artifacts: Sequence[str] = (),
    runtimes: Sequence[str] = (),
) -> list[Candidate]:
    """Return every pair of artifact and runtime with its verdict, in the manifest's order.

    Args:
        target: whose artifacts.
        spec: of this box.
        artifacts: file names to keep; empty for all.
        runtimes: names to keep; empty for all that read the format.

    Raises:
        InputFileError: nothing is left.
    """
    chosen = select_artifact(target.artifacts, spec, RUNTIME_FORMATS).chosen
    found = [
        candidate
        for artifact in target.artifacts
        if not artifacts or artifact.file in artifacts
        for candidate in _judge_by_runtime(artifact, spec, runtimes)
    ]
    if not found:
        files = ", ".join(item.file for item in target.artifacts)
        msg = f"nothing of {target.label} is left to look at; it has {files}"
        raise InputFileError(msg)
    return [_mark_chosen(item, chosen) for item in found]


def _judge_by_runtime(
    artifact: ArtifactSpec, spec: PlatformSpec, runtimes: Sequence[str]
) -> list[Candidate]:
    readers = [name for name, formats in RUNTIME_FORMATS.items() if artifact.format in formats]
    kept = [name for name in readers if not runtimes or name in runtimes]
    if not kept and not runtimes:
        return list(select_artifact([artifact], spec, RUNTIME_FORMATS).candidates)
    judged = []
    for name in kept:
        (item,) = select_artifact([artifact], spec, {name: RUNTIME_FORMATS[name]}).candidates
        is_out = item.verdict is Verdict.RULED_OUT
        verdict = Verdict.RULED_OUT if is_out else Verdict.COMPATIBLE
        judged.append(Candidate(artifact, name, verdict, item.reason if is_out else ""))
    return judged


def _mark_chosen(item: Candidate, chosen: Candidate | None) -> Candidate:
    is_chosen = (
        chosen is not None
        and item.verdict is Verdict.COMPATIBLE
        and (item.artifact, item.runtime) == (chosen.artifact, chosen.runtime)
    )
    return Candidate(item.artifact, item.runtime, Verdict.CHOSEN, "") if is_chosen else item


def look_at_box(settings: Settings) -> PlatformSpec:
    """Return what this box is, from its file or by looking, which takes some seconds."""
    from agent.platformfile import load_platform

    try:
        return load_platform(settings.data_dir)
    except OSError:
        # Nothing may be kept there; a measurement is no reason to want a data folder.
        from platforms.probe import probe_box
        from platforms.runtimes.proof import prove_runtimes

        return detect_platform(probe_box(Path.cwd()), prove_runtimes())
