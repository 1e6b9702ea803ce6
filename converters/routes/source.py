"""What a person gives to be converted: recognised by its content, refused where it is a trap.

Owns the answer to "what is this", found without a model library and without running anything:

    FILE.py:NAME     a function of a Python file that builds the torch module
    weights          safetensors, or a zip of torch with tensors only; with `FILE.py:NAME`
    TorchScript, .pt2, ONNX, TFLite    by their content, whatever the suffix
    SavedModel       its folder, or the `saved_model.pb` in it
    OpenVINO IR      its `.xml`

Invariants: no pickle is ever opened here, and in the child only by `weights_only`; the Python file
is parsed, not run. What is refused: pickles with more than tensors in them, compiled code, weights
outside the model's folder, tensors that the file cannot hold.
"""

import ast
import json
import math
import mmap
import pickletools
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from converters.errors import OversizedTensorError, PickledModelError, SourceError
from converters.routes.onnx_sizes import verify_declared_sizes
from converters.routes.workspace import list_parts
from converters.task import ModelFile, ModelFormat
from platforms.artifact import SAVED_MODEL_FILE
from platforms.protowire import BYTES, iterate_fields

_PYTHON = ".py"
_ZIP, _HDF5, _TFLITE = b"PK\x03\x04", b"\x89HDF\r\n\x1a\n", b"TFL3"
_PICKLES = (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
_NATIVE_SUFFIXES = (".so", ".dll", ".dylib", ".cubin", ".o")
_ZIP_FACTOR, _ZIP_BYTES = 100, 1 << 26
"""torch stores without compression; beyond both an archive unpacks to what it should not."""
_HEADER_MAX_BYTES = 100_000_000
"""Of safetensors; the format's own limit."""
_PICKLE_MAX_BYTES = 50_000_000
"""Of the part of a torch archive that says where the tensors are."""
_SAFE_MODULES = ("torch", "torch._utils", "torch._tensor", "collections")
_SAFE_NAMES = (
    "_rebuild_tensor_v2",
    "_rebuild_parameter",
    "_rebuild_device_tensor_from_numpy",
    "_set_obj_state",
    "OrderedDict",
    "Size",
    "device",
    *("bool", "uint8", "int8", "int16", "int32", "int64"),
    *("float16", "bfloat16", "float32", "float64"),
)
_SPARSE_FILE_FACTOR, _SPARSE_FILE_BYTES = 8, 1 << 26
"""A file may be this many times what its blocks on disk hold, or have this size."""
_BLOCK_BYTES = 512

_ITEM_BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("F4",), 4),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
}
"""Of safetensors' element types; those not named have 8."""

_HOW_TO_SAVE = (
    "save the weights alone (safetensors, or torch.save(module.state_dict())) and give "
    "--builder FILE.py:NAME, or export the module with torch.export.save"
)


def identify(text: str | Path, builder: str | None = None) -> ModelFile:
    """Return what is meant by a path, or by `FILE.py:NAME`.

    Args:
        text: as a person types it.
        builder: `FILE.py:NAME` of the function that builds the module, for weights.

    Raises:
        PickledModelError: it is a pickle, or an archive with pickled objects.
        OutsideDataError: a part of it lies outside its own folder.
        OversizedTensorError: tensors are declared that it does not hold.
        SourceError: it is not there, is of no format that is read here, or lacks its builder.
    """
    found = find_function(str(text))
    if found is not None:
        model = ModelFile(found[0], ModelFormat.CALLABLE, name=found[1])
    else:
        model = _identify_path(Path(text), builder)
    for part in list_parts(model).values():
        _verify_blocks(part)
    if model.format is ModelFormat.ONNX:
        verify_declared_sizes(model.path)
    return model


def find_function(text: str) -> tuple[Path, str] | None:
    """Return file and name of `FILE.py:NAME`, or None where the text is a path.

    Raises:
        SourceError: the file is missing or is no Python, or has no such name.
    """
    file, colon, name = text.rpartition(":")
    if not colon or not file.endswith(_PYTHON):
        if text.endswith(_PYTHON) and Path(text).is_file():
            msg = f"{text} is a Python file: name the function in it, {text}:NAME"
            raise SourceError(msg)
        return None
    path = Path(file).resolve()
    names = _read_names(path)
    if name not in names and "*" not in names:
        known = ", ".join(sorted(names)) or "none"
        msg = f"{file} defines no {name!r}; its functions and classes are: {known}"
        raise SourceError(msg)
    return path, name


def _read_names(path: Path) -> set[str]:
    """Return what a Python file defines or imports at its top level, without running it."""
    try:
        tree = ast.parse(path.read_bytes(), path.name)
    except OSError as exc:
        msg = f"{path} cannot be read: {exc.strerror}"
        raise SourceError(msg) from exc
    except (SyntaxError, ValueError) as exc:
        msg = f"{path} is no Python: {exc}"
        raise SourceError(msg) from exc
    return {name for node in tree.body for name in _iterate_names(node)}


def _iterate_names(node: ast.stmt) -> Iterator[str]:
    match node:
        case ast.FunctionDef() | ast.ClassDef():
            yield node.name
        case ast.Import() | ast.ImportFrom():
            yield from (found.asname or found.name for found in node.names)
        case ast.Assign():
            yield from (found.id for found in node.targets if isinstance(found, ast.Name))
        case ast.AnnAssign(target=ast.Name(id=name)):
            yield name


def _identify_path(path: Path, builder: str | None) -> ModelFile:
    path = path.resolve()
    if path.is_dir():
        return _identify_folder(path)
    if not path.is_file():
        msg = f"there is no model at {path}"
        raise SourceError(msg)
    if path.name == SAVED_MODEL_FILE:
        return ModelFile(path.parent, ModelFormat.SAVED_MODEL)
    found = _identify_file(path)
    if found is not ModelFormat.STATE_DICT:
        return ModelFile(path, found)
    function = find_function(builder) if builder else None
    if function is None:
        msg = f"{path.name} holds weights and no model: give --builder FILE.py:NAME that builds it"
        raise SourceError(msg)
    return ModelFile(path, found, name=function[1], builder=function[0])


def _identify_folder(path: Path) -> ModelFile:
    if (path / SAVED_MODEL_FILE).is_file():
        return ModelFile(path, ModelFormat.SAVED_MODEL)
    if path.suffix == ".mlpackage" and (path / "Manifest.json").is_file():
        return ModelFile(path, ModelFormat.COREML)
    msg = f"the folder {path} is no SavedModel: it has no {SAVED_MODEL_FILE}"
    raise SourceError(msg)


def _identify_file(path: Path) -> ModelFormat:
    with path.open("rb") as file:
        start = file.read(64)
    if start.startswith(_ZIP):
        return _identify_archive(path)
    if start[4:8] == _TFLITE:
        return ModelFormat.TFLITE
    if start.startswith(_PICKLES):
        msg = f"{path.name} is a pickle, which would run code when it is opened: {_HOW_TO_SAVE}"
        raise PickledModelError(msg)
    if start.startswith(_HDF5):
        msg = f"{path.name} is an HDF5 file (Keras): export a SavedModel from it"
        raise SourceError(msg)
    if _is_safetensors(path, start):
        return ModelFormat.STATE_DICT
    if path.suffix == ".xml" and b"<" in start:
        return ModelFormat.OPENVINO
    if _is_onnx(path):
        return ModelFormat.ONNX
    msg = (
        f"{path.name} is none of: TorchScript, .pt2, safetensors, ONNX, TFLite, OpenVINO IR, a "
        "SavedModel's folder, FILE.py:NAME"
    )
    raise SourceError(msg)


def _is_onnx(path: Path) -> bool:
    """Say whether the top level is a ModelProto: a graph, and nothing that has another type."""
    graph, strings, numbers = 7, {2, 3, 4, 6, 8, 14, 20, 25, 26}, {1, 5}
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            kinds = {
                found.number: found.wire_type == BYTES
                for found in iterate_fields(data, 0, len(data))
            }
    except (OSError, ValueError, IndexError):
        return False
    return kinds.get(graph, False) and all(
        (number in numbers and not is_bytes) or (number in strings | {graph} and is_bytes)
        for number, is_bytes in kinds.items()
    )


def _identify_archive(path: Path) -> ModelFormat:
    try:
        with zipfile.ZipFile(path) as archive:
            _verify_archive(path, archive)
            names = {name.partition("/")[2] for name in archive.namelist()}
            if "constants.pkl" in names and any(name.startswith("code/") for name in names):
                return ModelFormat.TORCHSCRIPT
            if "archive_format" in names and any(name.startswith("models/") for name in names):
                return ModelFormat.TORCH_EXPORT
            if "data.pkl" in names:
                _verify_pickle(path, archive)
                return ModelFormat.STATE_DICT
    except (OSError, zipfile.BadZipFile, ValueError, NotImplementedError, RuntimeError) as exc:
        msg = f"{path.name} is a damaged archive: {exc}"
        raise SourceError(msg) from exc
    msg = f"{path.name} is an archive, and none of TorchScript, .pt2 or torch's weights"
    raise SourceError(msg)


def _verify_archive(path: Path, archive: zipfile.ZipFile) -> None:
    entries = archive.infolist()
    unpacked = sum(entry.file_size for entry in entries)
    if unpacked > max(path.stat().st_size * _ZIP_FACTOR, _ZIP_BYTES):
        msg = f"{path.name} unpacks to {unpacked / 10**6:.0f} MB, far more than it has"
        raise OversizedTensorError(msg)
    for entry in entries:
        inner = entry.filename.partition("/")[2]
        if inner.startswith("data/aotinductor/") or inner.endswith(_NATIVE_SUFFIXES):
            msg = f"{path.name} carries compiled code, which is not run here: export the plain one"
            raise SourceError(msg)


def _verify_pickle(path: Path, archive: zipfile.ZipFile) -> None:
    """Refuse a torch archive whose pickle names anything but tensors; nothing is loaded."""
    entry = next(item for item in archive.infolist() if item.filename.endswith("/data.pkl"))
    if entry.file_size > _PICKLE_MAX_BYTES:
        msg = f"{path.name} describes its tensors in {entry.file_size} bytes"
        raise OversizedTensorError(msg)
    for module, name in _find_globals(archive.read(entry)):
        is_known = name in _SAFE_NAMES or (module == "torch" and name.endswith("Storage"))
        if module not in _SAFE_MODULES or not is_known:
            msg = (
                f"{path.name} is a pickle of {module}.{name}, and opening it would run code: "
                f"{_HOW_TO_SAVE}"
            )
            raise PickledModelError(msg)


def _find_globals(data: bytes) -> Iterator[tuple[str, str]]:
    """Yield (module, name) of everything that a pickle would import."""
    texts: list[str] = []
    for opcode, argument, _ in pickletools.genops(data):
        if opcode.name in ("GLOBAL", "INST"):
            module, _, name = str(argument).partition(" ")
            yield module, name
        elif opcode.name == "STACK_GLOBAL":
            # The texts may come from the memo as well, which is not followed: then it is refused.
            yield (texts[-2], texts[-1]) if len(texts) > 1 else ("?", "?")
        elif isinstance(argument, str):
            texts.append(argument)


def _is_safetensors(path: Path, start: bytes) -> bool:
    """Say whether it is safetensors, and compare what its header declares with what it holds."""
    length = int.from_bytes(start[:8], "little")
    size = path.stat().st_size
    if start[8:9] != b"{" or length > min(_HEADER_MAX_BYTES, size - 8):
        if path.suffix == ".safetensors":
            msg = f"{path.name} has a header of {length} bytes in a file of {size}: it is damaged"
            raise OversizedTensorError(msg)
        return False
    with path.open("rb") as file:
        file.seek(8)
        header = file.read(length)
    try:
        entries = json.loads(header)
        for name, entry in entries.items():
            if name != "__metadata__":
                _verify_entry(path, name, entry, size - 8 - length)
    except (ValueError, KeyError, TypeError, AttributeError) as exc:
        msg = f"{path.name} looks like safetensors with a damaged header: {exc}"
        raise SourceError(msg) from exc
    return True


def _verify_entry(path: Path, name: str, entry: dict[str, Any], held: int) -> None:
    first, last = entry["data_offsets"]
    declared = math.prod(entry["shape"]) * _ITEM_BITS.get(str(entry["dtype"]), 8) // 8
    if not 0 <= first <= last <= held or declared != last - first:
        msg = (
            f"{path.name} declares the tensor {name!r} with {declared} bytes at {first}…{last} of "
            f"{held}"
        )
        raise OversizedTensorError(msg)


def _verify_blocks(path: Path) -> None:
    """Refuse a file that is mostly holes: it costs nothing to send and gigabytes to read."""
    found = path.stat()
    held = getattr(found, "st_blocks", found.st_size) * _BLOCK_BYTES
    if found.st_size > max(held * _SPARSE_FILE_FACTOR, _SPARSE_FILE_BYTES):
        msg = f"{path.name} has {found.st_size / 10**6:.0f} MB, of which {held} bytes are on disk"
        raise OversizedTensorError(msg)
