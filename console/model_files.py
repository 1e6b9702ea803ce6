"""The files that a model outside the repository consists of.

Owns which formats are taken in by their file's name, and which other files belong to one: an
ONNX file's external weights, an IR's `.bin`, all of a SavedModel's folder. Knows no manifest.

Invariant: nothing is copied from outside the folder given.
"""

import shutil
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from agent.manifest import TensorEntry
from console.errors import InputFileError
from platforms.artifact import SAVED_MODEL_FILE, ArtifactFormat, TensorSpec
from platforms.errors import RuntimeMissingError
from platforms.runtimes.base import LoadOptions, Session
from platforms.runtimes.onnx_locations import read_external_locations
from platforms.runtimes.registry import RUNTIME_FORMATS, get_runtime

FORMATS = {
    ".onnx": ArtifactFormat.ONNX,
    ".pt": ArtifactFormat.TORCHSCRIPT,
    ".pt2": ArtifactFormat.TORCH_EXPORT,
    ".tflite": ArtifactFormat.TFLITE,
    ".xml": ArtifactFormat.OPENVINO,
    ".savedmodel": ArtifactFormat.SAVED_MODEL,
}
"""Format by suffix, as Triton's backends call their files, too."""


def find_parts(root: Path, artifact: str) -> Iterator[str]:
    """Yield the files that an artifact consists of, itself first, as paths below `root`."""
    yield artifact
    path = root / artifact
    if path.suffix == ".onnx":
        folder = PurePosixPath(artifact).parent
        yield from (str(folder / location) for location in read_external_locations(path))
    elif path.suffix == ".xml":
        yield str(PurePosixPath(artifact).with_suffix(".bin"))
    elif path.name == SAVED_MODEL_FILE:
        for part in sorted(path.parent.rglob("*")):
            if part.is_file() and part != path:
                yield part.relative_to(root).as_posix()


def copy_part(root: Path, file: str, target: Path) -> str:
    """Copy `root/file` to `target/file`, and return `file`.

    Raises:
        InputFileError: it is missing, or outside `root`.
    """
    source = root / file
    if not source.resolve().is_relative_to(root.resolve()) or ".." in PurePosixPath(file).parts:
        msg = f"{file!r} is outside {root}"
        raise InputFileError(msg)
    if not source.is_file():
        msg = f"{source} is missing"
        raise InputFileError(msg)
    copy = target / file
    copy.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, copy)
    return file


def load_somewhere(path: Path, model_format: ArtifactFormat) -> Session:
    """Load a model with the first runtime of its format that is installed.

    Raises:
        RuntimeMissingError: none is.
        ModelLoadError: the runtime refuses the model.
    """
    missing = f"no runtime reads {model_format.value}"
    for runtime, formats in RUNTIME_FORMATS.items():
        if model_format in formats:
            try:
                return get_runtime(runtime).load(path, LoadOptions(threads=1))
            except RuntimeMissingError as exc:
                missing = str(exc)
    raise RuntimeMissingError(missing)


def to_entries(specs: tuple[TensorSpec, ...]) -> tuple[TensorEntry, ...]:
    """Return a session's tensors as a manifest has them."""
    return tuple(
        TensorEntry(name=spec.name, datatype=spec.datatype, shape=spec.shape) for spec in specs
    )
