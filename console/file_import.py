"""From a bare model file to a model version: the manifest comes from the graph.

Owns the making of a version folder for a model that somebody has lying about: a file, or a
SavedModel's folder. The graph says names, element types and shapes; what it cannot say (labels,
how an image becomes a tensor) is left to a manifest written by hand, and the model takes tensors.
"""

import shutil
from pathlib import Path

from agent.manifest import ArtifactEntry, Manifest, compute_sha256, write_manifest
from console.errors import InputFileError
from console.model_files import FORMATS, copy_part, find_parts, load_somewhere, to_entries
from platforms.artifact import SAVED_MODEL_FILE, ArtifactFormat, Precision

_DIGEST_SHOWN = 12


def find_format(source: Path) -> ArtifactFormat | None:
    """Return the format of a file, or of a SavedModel's folder; None: it is no model."""
    if source.is_dir():
        is_saved_model = (source / SAVED_MODEL_FILE).is_file()
        return ArtifactFormat.SAVED_MODEL if is_saved_model else None
    return FORMATS.get(source.suffix) if source.is_file() else None


def write_file_version(
    source: Path, folder: Path, name: str, *, release: str | None, precision: Precision
) -> Manifest:
    """Write a version of the model `source`, with all files that belong to it, into `folder`.

    The model is loaded once, so one that cannot run here is refused here.

    Args:
        source: the file, or a SavedModel's folder.
        folder: an empty one.
        name: the model's name.
        release: the publisher's name for this version; else made from the file's digest.
        precision: of the weights, which the graph does not say.

    Raises:
        InputFileError: it is no model file, or a file that belongs to it is missing.
        ModelLoadError: the runtime refuses it.
        RuntimeMissingError: no runtime that reads it is installed.
        ManifestError: the graph has no inputs or outputs, or unusable names.
    """
    model_format = find_format(source)
    if model_format is None:
        msg = f"{source} is no model file: {', '.join(FORMATS)}"
        raise InputFileError(msg)
    # A file may be a link to somewhere else; what belongs to it lies beside the link.
    source = source.resolve() if source.is_dir() else source.absolute()
    artifact = source.name
    if model_format is ArtifactFormat.SAVED_MODEL:
        artifact = f"{artifact}/{SAVED_MODEL_FILE}"
    _, *others = find_parts(source.parent, artifact)
    for file in others:
        copy_part(source.parent, file, folder)
    (folder / artifact).parent.mkdir(exist_ok=True)
    shutil.copyfile(source.parent / artifact, folder / artifact)
    session = load_somewhere(folder / artifact, model_format)
    inputs, outputs = session.inputs, session.outputs
    session.close()
    digest = compute_sha256(folder / artifact)
    manifest = Manifest(
        schema="edgeward.manifest/v1",
        name=name,
        version=release or f"sha256-{digest[:_DIGEST_SHOWN]}",
        description=f"Added from {source.name}; takes tensors.",
        inputs=to_entries(inputs),
        outputs=to_entries(outputs),
        artifacts=(
            ArtifactEntry(
                file=artifact,
                format=model_format,
                precision=precision,
                sha256=digest,
                size_bytes=(folder / artifact).stat().st_size,
            ),
        ),
        files={file: compute_sha256(folder / file) for file in others},
    )
    write_manifest(manifest, folder)
    return manifest
