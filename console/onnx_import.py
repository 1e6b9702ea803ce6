"""From a bare ONNX file to a model version: the manifest comes from the graph.

Owns the making of a version folder for a file that somebody has lying about. The graph
says names, element types and shapes; what it cannot say (labels, how an image becomes a
tensor) is left to a manifest written by hand, and the model takes tensors.
"""

import shutil
from pathlib import Path

from agent.manifest import (
    ArtifactEntry,
    Manifest,
    TensorEntry,
    compute_sha256,
    write_manifest,
)
from platforms.artifact import ArtifactFormat, Precision, TensorSpec
from platforms.runtimes.base import LoadOptions
from platforms.runtimes.onnx_locations import read_external_locations
from platforms.runtimes.registry import get_runtime

_DIGEST_SHOWN = 12


def write_onnx_version(
    source: Path, folder: Path, name: str, *, release: str | None, precision: Precision
) -> Manifest:
    """Write a version of the ONNX file `source`, with its external weights, into `folder`.

    The model is loaded once, so a file that cannot run here is refused here.

    Args:
        source: the file.
        folder: an empty one.
        name: the model's name.
        release: the publisher's name for this version; else made from the file's digest.
        precision: of the weights, which the graph does not say.

    Raises:
        ModelLoadError: the runtime refuses the file.
        RuntimeMissingError: onnxruntime is not installed.
        ManifestError: the graph has no inputs or outputs, or unusable names.
    """
    weights = read_external_locations(source)
    session = get_runtime("ort").load(source, LoadOptions(threads=1))
    inputs, outputs = session.inputs, session.outputs
    session.close()
    for file in (source.name, *weights):
        target = folder / file
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source.parent / file, target)
    digest = compute_sha256(folder / source.name)
    manifest = Manifest(
        schema="edgeward.manifest/v1",
        name=name,
        version=release or f"sha256-{digest[:_DIGEST_SHOWN]}",
        description=f"Added from {source.name}; takes tensors.",
        inputs=_to_entries(inputs),
        outputs=_to_entries(outputs),
        artifacts=(
            ArtifactEntry(
                file=source.name,
                format=ArtifactFormat.ONNX,
                precision=precision,
                sha256=digest,
                size_bytes=source.stat().st_size,
            ),
        ),
        files={file: compute_sha256(folder / file) for file in weights},
    )
    write_manifest(manifest, folder)
    return manifest


def _to_entries(specs: tuple[TensorSpec, ...]) -> tuple[TensorEntry, ...]:
    return tuple(
        TensorEntry(name=spec.name, datatype=spec.datatype, shape=spec.shape) for spec in specs
    )
