"""The folder of a converted version: manifest, artifacts, golden set, `config.pbtxt`.

Owns its layout and the manifest's words; verifies what it wrote by reading it again.

    manifest.json  config.pbtxt  golden_inputs.npz  golden_outputs.npz
    model.<format>[.<precision>].<suffix> …  report.html  report.json  <files of the source>
"""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from agent.errors import ManifestError
from agent.manifest import (
    SCHEMA,
    ArtifactEntry,
    Golden,
    Manifest,
    Requirements,
    Step,
    TensorEntry,
    Tolerance,
    compute_sha256,
    verify_files,
    write_manifest,
)
from converters.errors import OutputExistsError
from platforms.artifact import (
    MLPACKAGE_FILE,
    SAVED_MODEL_FILE,
    ArtifactFormat,
    Precision,
    TensorSpec,
    locate_model,
)
from platforms.runtimes.base import Array
from worker.engine.modelconfig.completion import DEFAULT_MAX_ROWS
from worker.engine.modelconfig.serving import get_type_number
from worker.engine.modelconfig.text import CONFIG_FILE, format_config

GOLDEN_INPUTS, GOLDEN_OUTPUTS = "golden_inputs.npz", "golden_outputs.npz"


@dataclass(frozen=True)
class Identity:
    """What the version is, beyond its tensors and files."""

    name: str
    version: str
    description: str = ""
    license: str = ""
    preprocess: Step = field(default_factory=lambda: Step(name="tensor"))
    postprocess: tuple[Step, ...] = ()
    objective: str = "latency_p95"


@dataclass(frozen=True)
class MadeArtifact:
    """One proven artifact, where the converters left it."""

    path: Path
    """Its file, or its folder; an IR's `.bin` lies beside its `.xml`."""
    format: ArtifactFormat
    precision: Precision
    requires: Requirements = field(default_factory=Requirements)
    tolerance: Tolerance | None = None


@dataclass(frozen=True)
class Contents:
    """All that goes into the folder."""

    identity: Identity
    inputs: Sequence[TensorSpec]
    outputs: Sequence[TensorSpec]
    artifacts: Sequence[MadeArtifact]
    """In the publisher's order: what a box takes that has measured nothing."""
    golden_inputs: Mapping[str, Array]
    golden_outputs: Mapping[str, Array]
    tolerance: Tolerance = field(default_factory=Tolerance)
    files: Mapping[str, Path] = field(default_factory=dict)
    """Further files, such as labels and the report, by their name in the folder."""


def write_folder(contents: Contents, folder: Path) -> Manifest:
    """Write the version into `folder`, which must be empty or not there.

    Raises:
        ManifestError: what is said of the version is no manifest.
        OutputExistsError: the folder has something in it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        msg = f"{folder} is not empty: name another one"
        raise OutputExistsError(msg)
    files = {name: _copy(source, folder / name) for name, source in contents.files.items()}
    np.savez_compressed(folder / GOLDEN_INPUTS, **dict(contents.golden_inputs))  # type: ignore[arg-type]
    np.savez_compressed(folder / GOLDEN_OUTPUTS, **dict(contents.golden_outputs))  # type: ignore[arg-type]
    _write_config(contents, folder / CONFIG_FILE)
    for name in (GOLDEN_INPUTS, GOLDEN_OUTPUTS, CONFIG_FILE):
        files[name] = compute_sha256(folder / name)
    entries: list[ArtifactEntry] = []
    for artifact in contents.artifacts:
        entry, others = _add_artifact(artifact, folder)
        entries.append(entry)
        files.update(others)
    manifest = _build_manifest(contents, tuple(entries), files)
    write_manifest(manifest, folder)
    verify_files(manifest, folder)
    return manifest


def _copy(source: Path, target: Path) -> str:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
    return compute_sha256(target)


def _add_artifact(artifact: MadeArtifact, folder: Path) -> tuple[ArtifactEntry, dict[str, str]]:
    """Copy an artifact with what belongs to it; return its entry and the others' digests."""
    path = artifact.path
    others: dict[str, str] = {}
    if path.is_dir():
        shutil.copytree(path, folder / path.name)
        head = MLPACKAGE_FILE if artifact.format is ArtifactFormat.COREML else SAVED_MODEL_FILE
        file = f"{path.name}/{head}"
        for part in sorted((folder / path.name).rglob("*")):
            name = part.relative_to(folder).as_posix()
            if part.is_file() and name != file:
                others[name] = compute_sha256(part)
    else:
        shutil.copyfile(path, folder / path.name)
        file = path.name
        weights = path.with_suffix(".bin")
        if artifact.format is ArtifactFormat.OPENVINO and weights.is_file():
            others[weights.name] = _copy(weights, folder / weights.name)
    entry = ArtifactEntry(
        file=file,
        format=artifact.format,
        precision=artifact.precision,
        sha256=compute_sha256(folder / file),
        size_bytes=(folder / file).stat().st_size,
        requires=artifact.requires,
        tolerance=artifact.tolerance,
    )
    return entry, others


def measure_size(path: Path) -> int:
    """Return the bytes of an artifact with all that belongs to it."""
    opened = locate_model(path)
    if opened.is_dir():
        return sum(part.stat().st_size for part in opened.rglob("*") if part.is_file())
    weights = opened.with_suffix(".bin")
    extra = weights.stat().st_size if opened.suffix == ".xml" and weights.is_file() else 0
    return opened.stat().st_size + extra


def _build_manifest(
    contents: Contents, artifacts: tuple[ArtifactEntry, ...], files: dict[str, str]
) -> Manifest:
    identity = contents.identity
    document: dict[str, Any] = {
        "schema": SCHEMA,
        "name": identity.name,
        "version": identity.version,
        "description": identity.description,
        "license": identity.license,
        "inputs": _to_entries(contents.inputs),
        "outputs": _to_entries(contents.outputs),
        "preprocess": identity.preprocess,
        "postprocess": identity.postprocess,
        "artifacts": artifacts,
        "files": files,
        "objective": identity.objective,
        "golden": Golden(
            inputs=GOLDEN_INPUTS, outputs=GOLDEN_OUTPUTS, tolerance=contents.tolerance
        ),
    }
    try:
        return Manifest.model_validate(document)
    except ValidationError as exc:
        first = exc.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "(whole document)"
        msg = f"what is said of the model makes no manifest: {where}: {first['msg']}"
        raise ManifestError(msg) from exc


def _to_entries(specs: Sequence[TensorSpec]) -> tuple[TensorEntry, ...]:
    return tuple(TensorEntry(name=s.name, datatype=s.datatype, shape=s.shape) for s in specs)


def _write_config(contents: Contents, path: Path) -> None:
    """Write what Triton would be told of the model: its tensors, and that it batches."""
    from worker.engine.modelconfig.message import get_config_class

    message = get_config_class()()
    message.name = contents.identity.name
    is_batched = all(spec.has_free_batch for spec in (*contents.inputs, *contents.outputs))
    message.max_batch_size = DEFAULT_MAX_ROWS if is_batched else 0
    for side, specs in (("input", contents.inputs), ("output", contents.outputs)):
        for spec in specs:
            dims = spec.shape[1:] if is_batched else spec.shape
            getattr(message, side).add(
                name=spec.name, data_type=get_type_number(spec.datatype), dims=dims
            )
    path.write_text(format_config(message), encoding="utf-8")
