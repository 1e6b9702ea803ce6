"""The files that make up one model: which they are, their digest, a copy of them.

Owns the answer to "what belongs to this model": a file, a folder, the `.bin` beside an OpenVINO
IR, the weights an ONNX file keeps elsewhere in its folder, the Python file beside weights.

Invariants: nothing outside the model's own folder is read or copied, by a path or by a link;
the digest depends on names and contents only, so that a copy has its original's.
"""

import hashlib
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from converters.errors import OutsideDataError, SourceError
from converters.task import ModelFile, ModelFormat
from platforms.artifact import Precision
from platforms.errors import ModelLoadError
from platforms.runtimes.onnx_locations import read_external_locations


def list_parts(model: ModelFile) -> dict[str, Path]:
    """Return every file of a model by the name it has relative to the model's folder, sorted.

    Raises:
        SourceError: the model is not there, has nothing in it, or is no ONNX file where it
            says so.
        OutsideDataError: a part lies outside the model's own folder.
    """
    path = model.path
    if path.is_dir():
        return _list_folder(path)
    if not path.is_file():
        msg = f"there is no model at {path}"
        raise SourceError(msg)
    parts = {path.name: path, **_find_companions(model)}
    return dict(sorted(parts.items()))


def _list_folder(folder: Path) -> dict[str, Path]:
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        _verify_inside(path, folder, folder.name)
        if path.is_file():
            found[f"{folder.name}/{name.as_posix()}"] = path
    if not found:
        msg = f"the folder {folder} holds no file"
        raise SourceError(msg)
    return found


def _find_companions(model: ModelFile) -> Mapping[str, Path]:
    path = model.path
    match model.format:
        case ModelFormat.OPENVINO:
            weights = path.with_suffix(".bin")
            return {weights.name: weights} if weights.is_file() else {}
        case ModelFormat.ONNX:
            return {name: path.parent / name for name in _read_locations(path)}
        case ModelFormat.STATE_DICT if model.builder is not None:
            return {model.builder.name: model.builder}
        case _:
            return {}


def _read_locations(path: Path) -> tuple[str, ...]:
    try:
        locations = read_external_locations(path)
    except ModelLoadError as exc:
        raise SourceError(str(exc)) from exc
    for location in locations:
        part = path.parent / location
        _verify_inside(part, path.parent, path.name)
        if not part.is_file():
            msg = f"{path.name} keeps weights in {location!r}, which is not there"
            raise SourceError(msg)
    return locations


def _verify_inside(part: Path, folder: Path, name: str) -> None:
    if not part.resolve().is_relative_to(folder.resolve()):
        msg = f"{name} reaches {part}, outside its own folder: put all of a model into one folder"
        raise OutsideDataError(msg)


def compute_digest(model: ModelFile) -> str:
    """Return a sha256 over the names and contents of all parts, lower-case hex.

    Raises:
        SourceError: as `list_parts`, or a part cannot be read.
    """
    total = hashlib.sha256()
    try:
        for name, path in list_parts(model).items():
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            total.update(f"{name}\0{digest}\n".encode())
    except OSError as exc:
        msg = f"{model.path} cannot be read: {exc.strerror}"
        raise SourceError(msg) from exc
    return total.hexdigest()


def measure_size(model: ModelFile) -> int:
    """Return the size of all parts in bytes, the Python file of weights left out.

    Raises:
        SourceError: as `list_parts`.
    """
    parts = list_parts(model).values()
    return sum(path.stat().st_size for path in parts if path != model.builder)


def copy_model(model: ModelFile, folder: Path) -> ModelFile:
    """Copy a model with all its parts into `folder`, links as the files they lead to.

    Raises:
        SourceError: as `list_parts`, or the copy cannot be written.
    """
    try:
        for name, path in list_parts(model).items():
            copy = folder / name
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)
    except OSError as exc:
        msg = f"{model.path} cannot be copied to {folder}: {exc.strerror}"
        raise SourceError(msg) from exc
    builder = None if model.builder is None else folder / model.builder.name
    return replace(model, path=folder / model.path.name, builder=builder)


def encode_model(model: ModelFile) -> dict[str, Any]:
    """Return a JSON-ready form that `decode_model` reads back."""
    return {
        "path": str(model.path),
        "format": model.format.value,
        "precision": model.precision.value,
        "name": model.name,
        "builder": None if model.builder is None else str(model.builder),
    }


def decode_model(data: Mapping[str, Any]) -> ModelFile:
    """Rebuild a model from `encode_model`'s form."""
    return ModelFile(
        path=Path(data["path"]),
        format=ModelFormat(data["format"]),
        precision=Precision(data["precision"]),
        name=data["name"],
        builder=None if data["builder"] is None else Path(data["builder"]),
    )
