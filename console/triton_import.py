"""Model folders of a Triton server, taken in and written out.

Owns both layouts that are taken in: Triton's own, `NAME/config.pbtxt` beside numeric version
folders, and `NAME/v1.0/{model.onnx,config.pbtxt}` with a link `latest`; and the one that is
written, which is Triton's. Runs each model once where a runtime for it is there.

Invariants: nothing is read from outside the folder given; every file taken in is in the
manifest with its sha256. All versions are prepared before the first one is added.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from agent.manifest import (
    ArtifactEntry,
    Manifest,
    TensorEntry,
    compute_sha256,
    read_manifest,
    write_manifest,
)
from console.errors import InputFileError
from console.model_files import FORMATS, copy_part, find_parts, load_somewhere, to_entries
from platforms.artifact import SAVED_MODEL_FILE, ArtifactFormat, Precision
from platforms.errors import RuntimeMissingError
from worker.engine.modelconfig.completion import Graph, complete
from worker.engine.modelconfig.serving import WarmupSource, from_config, read_datatype
from worker.engine.modelconfig.source import build_serving, find_config
from worker.engine.modelconfig.support import verify_supported
from worker.engine.modelconfig.text import CONFIG_FILE, ConfigText, format_config, parse_config
from worker.engine.sessions import probe_batching

LATEST = "latest"


@dataclass(frozen=True, slots=True)
class TritonVersion:
    """One version folder of a Triton model."""

    folder: Path
    release: str
    """The folder's name; `v` goes before a bare number, which would read as one of ours."""


def find_versions(folder: Path) -> tuple[TritonVersion, ...]:
    """Return the version folders of a Triton model, oldest first by their numbers."""
    found = [
        path
        for path in folder.iterdir()
        if path.is_dir() and not path.is_symlink() and re.fullmatch(r"v?\d[\w.-]*", path.name)
    ]
    found.sort(key=lambda path: ([int(part) for part in re.findall(r"\d+", path.name)], path.name))
    return tuple(
        TritonVersion(path, f"v{path.name}" if path.name.isdecimal() else path.name)
        for path in found
    )


def find_latest(folder: Path) -> str | None:
    """Return the release that a link `latest` names, or None where there is no such link."""
    link = folder / LATEST
    if not link.is_symlink():
        return None
    target = link.readlink().name
    known = {version.folder.name: version.release for version in find_versions(folder)}
    if target not in known:
        msg = f"{link} points to {target!r}, which is no version of {folder.name}"
        raise InputFileError(msg)
    return known[target]


def write_triton_version(
    model: Path,
    version: TritonVersion,
    target: Path,
    name: str,
    *,
    precision: Precision,
    has_gpu: bool,
) -> Manifest:
    """Write one version of the Triton model in `model`, with a manifest, into `target`.

    Args:
        model: the Triton model's folder.
        version: one of `find_versions`.
        target: an empty folder.
        name: the model's name here.
        precision: of the weights, which Triton does not say.
        has_gpu: instances on a GPU are taken.

    Raises:
        InputFileError: a file is missing, or is outside the folder.
        ModelConfigError, UnsupportedConfigError: its `config.pbtxt` cannot be used.
        ModelLoadError: the runtime refuses the model.
        ManifestError: the tensors are unusable.
    """
    config = _read_config(model, version.folder, has_gpu=has_gpu)
    artifact, artifact_format = _find_artifact(version.folder, config)
    copied = [
        copy_part(version.folder, file, target) for file in find_parts(version.folder, artifact)
    ]
    if config is not None:
        copied += [copy_part(model, file, target) for file in _find_companions(config)]
        copied.append(copy_part(Path(config.origin).parent, CONFIG_FILE, target))
    inputs, outputs = _read_tensors(target / artifact, artifact_format, config)
    others = dict.fromkeys(file for file in copied if file != artifact)
    manifest = Manifest(
        schema="edgeward.manifest/v1",
        name=name,
        version=version.release,
        description=f"Added from the Triton model {model.name}; takes tensors.",
        inputs=inputs,
        outputs=outputs,
        artifacts=(
            ArtifactEntry(
                file=artifact,
                format=artifact_format,
                precision=precision,
                sha256=compute_sha256(target / artifact),
                size_bytes=(target / artifact).stat().st_size,
            ),
        ),
        files={file: compute_sha256(target / file) for file in others},
    )
    write_manifest(manifest, target)
    return manifest


def _read_config(model: Path, version: Path, *, has_gpu: bool) -> ConfigText | None:
    for folder in (version, model):
        path = folder / CONFIG_FILE
        if path.is_file():
            config = parse_config(path.read_bytes(), str(path))
            verify_supported(config, has_gpu=has_gpu)
            return config
    return None


def _find_artifact(version: Path, config: ConfigText | None) -> tuple[str, ArtifactFormat]:
    """Return the model file of a version folder, below it, and its format."""
    named = "" if config is None else config.message.default_model_filename
    names = [named] if named else [f"model{suffix}" for suffix in FORMATS]
    for name in names:
        path = version / name
        model_format = FORMATS.get(Path(name).suffix)
        if model_format is None or not path.exists():
            continue
        if model_format is ArtifactFormat.SAVED_MODEL:
            return f"{name}/{SAVED_MODEL_FILE}", model_format
        # Triton also takes a folder of that name, for a model in several files.
        return (f"{name}/{name}" if path.is_dir() else name), model_format
    msg = f"{version} has none of {', '.join(names)}: no model that Edgeward reads"
    raise InputFileError(msg)


def _find_companions(config: ConfigText) -> Iterator[str]:
    """Yield the files beside the versions that a configuration names: labels, warm-up data."""
    yield from (entry.label_filename for entry in config.message.output if entry.label_filename)
    for sample in from_config(config).warmup:
        for tensor in sample.inputs.values():
            if tensor.source is WarmupSource.FILE and tensor.file is not None:
                yield tensor.file


Tensors = tuple[TensorEntry, ...]


def _read_tensors(
    path: Path, model_format: ArtifactFormat, config: ConfigText | None
) -> tuple[Tensors, Tensors]:
    """Return inputs and outputs by the graph, or by the file where nothing here can load it."""
    try:
        session = load_somewhere(path, model_format)
    except RuntimeMissingError:
        if config is None or not (config.message.input and config.message.output):
            raise
        message = config.message
        return (
            _read_entries(message.input, message.max_batch_size),
            _read_entries(message.output, message.max_batch_size),
        )
    try:
        graph = Graph(
            "", model_format, path.name, session.inputs, session.outputs, probe_batching(session)
        )
    finally:
        session.close()
    if config is not None:
        # Only for its checks: what contradicts the graph is refused here, not at the first load.
        complete(config, graph, from_config(config))
    return to_entries(graph.inputs), to_entries(graph.outputs)


def _read_entries(entries: Iterator[object], max_batch_size: int) -> Tensors:
    batch = (-1,) if max_batch_size else ()
    found: list[TensorEntry] = []
    for entry in entries:
        name, dims = getattr(entry, "name", ""), getattr(entry, "dims", ())
        datatype = read_datatype(getattr(entry, "data_type", 0))
        found.append(TensorEntry(name=name, datatype=datatype, shape=(*batch, *dims)))
    return tuple(found)


# --- writing --------------------------------------------------------------------------------------


def export_triton(folders: dict[int, Path], target: Path) -> list[Path]:
    """Write versions of one model in Triton's layout; return the files written.

    The first artifact, in the publisher's order, that Triton has a backend for is written, with
    all other files of the version. `config.pbtxt` is the completed one of the last version.

    Args:
        folders: the versions' folders by number, ascending.
        target: the model's new folder; must not exist.

    Raises:
        InputFileError: the folder exists, or no artifact is one that Triton reads.
        ModelLoadError, RuntimeMissingError: the model cannot be looked into here.
    """
    if target.exists():
        msg = f"{target} exists already: name a folder that does not"
        raise InputFileError(msg)
    for number, folder in folders.items():
        manifest = read_manifest(folder)
        artifact = _choose_artifact(manifest)
        parts = [artifact.file, *(file for file in manifest.files if file != CONFIG_FILE)]
        # Whether this box could serve it does not matter here.
        config = find_config(folder, manifest, has_gpu=True)
        companions = set() if config is None else set(_find_companions(config))
        for file in parts:
            copy_part(folder, file, target if file in companions else target / str(number))
        text = _build_config(folder, manifest, artifact, config)
        (target / CONFIG_FILE).write_text(text, encoding="utf-8")
    return sorted(path for path in target.rglob("*") if path.is_file())


def _choose_artifact(manifest: Manifest) -> ArtifactEntry:
    known = set(FORMATS.values())
    found = next((entry for entry in manifest.artifacts if entry.format in known), None)
    if found is None:
        msg = f"{manifest.name} {manifest.version} has no artifact that Triton reads"
        raise InputFileError(msg)
    return found


def _build_config(
    folder: Path, manifest: Manifest, artifact: ArtifactEntry, config: ConfigText | None
) -> str:
    session = load_somewhere(folder / artifact.file, artifact.format)
    try:
        is_batchable = probe_batching(session)
    finally:
        session.close()
    graph = Graph(
        name=manifest.name,
        format=artifact.format,
        file=_name_for_triton(artifact),
        inputs=tuple(entry.to_spec() for entry in manifest.inputs),
        outputs=tuple(entry.to_spec() for entry in manifest.outputs),
        is_batchable=is_batchable,
    )
    return format_config(complete(config, graph, build_serving(config, manifest)))


def _name_for_triton(artifact: ArtifactEntry) -> str:
    """Return what Triton opens: for a SavedModel, and a model in a folder, that folder."""
    return PurePosixPath(artifact.file).parts[0]
