"""Tensors in and out as Open Inference Protocol JSON, and one tensor as a `.npy` file.

Owns the strict reading of what a stranger sends: the names are the model's, the
count of values is the shape's product, every value is of the datatype's JSON type
and in its range, and a float is finite. Never unpickles: a `.npy` header is matched
against the one form that `numpy.save` writes, and nothing is allocated for a shape
that the bytes do not fill.

Source: KServe Open Inference Protocol V2, "Tensor Data": `data` is flat, row-major,
or nested as the shape says; numpy.lib.format, version 1.0 to 3.0.
"""

import math
import re
from collections.abc import Callable, Mapping
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import numpy as np

from agent.manifest import Manifest
from platforms.artifact import Datatype, TensorSpec
from platforms.runtimes.base import DATATYPES, DTYPES, Array, is_shape_allowed
from worker.errors import NanOutputError, OutputError, PreprocessError, StepParamsError
from worker.processing.step import (
    JobInput,
    Postprocessor,
    Preprocessor,
    StepParams,
    parse_params,
)

_REQUIRED_KEYS = {"name", "shape", "datatype", "data"}
_OPTIONAL_KEYS = {"parameters"}

_NPY_MAGIC = b"\x93NUMPY"
_NPY_HEADER = re.compile(
    r"\{'descr': '([<>|=][a-z]\d{1,2})', 'fortran_order': (True|False), "
    r"'shape': \(((?:\d{1,18}, ?)*(?:\d{1,18})?)\),? ?\}\s*"
)
_NPY_HEADER_MAX_BYTES = 10_000
"""As `numpy.load`'s default `max_header_size`."""


class TensorInput:
    """Reads a job's tensors as the manifest declares them."""

    def __init__(self, manifest: Manifest) -> None:
        """Remember each input with the function that reads its values."""
        self._specs = {entry.name: entry.to_spec() for entry in manifest.inputs}
        self._readers = {name: _get_reader(spec.datatype) for name, spec in self._specs.items()}

    def __call__(self, given: JobInput) -> dict[str, Array]:
        """Return the tensors of `given`, each of its declared shape and element type.

        Raises:
            PreprocessError: they are not the model's inputs, or a value does not fit.
        """
        if given.tensors is not None:
            return self._read_json(given.tensors)
        if given.data is not None:
            return self._read_file(given.data)
        msg = "the job brought neither tensors nor a file's bytes"
        raise PreprocessError(msg)

    def _read_json(self, tensors: object) -> dict[str, Array]:
        if not isinstance(tensors, list):
            msg = f"tensors must be a list, not {type(tensors).__name__}"
            raise PreprocessError(msg)
        found: dict[str, Array] = {}
        for tensor in tensors:
            spec, data = self._check_entry(tensor, found)
            shape = tensor["shape"]
            flat = _flatten(data, shape, spec.name)
            found[spec.name] = self._readers[spec.name](flat, spec.name).reshape(shape)
        if len(found) != len(self._specs):
            missing = sorted(self._specs.keys() - found.keys())
            msg = f"the model also takes {', '.join(missing)}"
            raise PreprocessError(msg)
        return found

    def _check_entry(self, tensor: Any, found: Mapping[str, Array]) -> tuple[TensorSpec, Any]:
        if not isinstance(tensor, dict) or not (
            _REQUIRED_KEYS <= tensor.keys() <= _REQUIRED_KEYS | _OPTIONAL_KEYS
        ):
            msg = "a tensor is an object of name, shape, datatype and data"
            raise PreprocessError(msg)
        name = tensor["name"]
        spec = self._specs.get(name) if isinstance(name, str) else None
        if spec is None or name in found:
            msg = f"tensor {name!r} is no input of the model, or comes twice: {[*self._specs]}"
            raise PreprocessError(msg)
        if tensor["datatype"] != spec.datatype.value:
            msg = f"{name}: the model takes {spec.datatype}, not {tensor['datatype']!r}"
            raise PreprocessError(msg)
        _check_shape(spec, tensor["shape"])
        return spec, tensor["data"]

    def _read_file(self, data: bytes) -> dict[str, Array]:
        if len(self._specs) != 1:
            msg = f"a .npy file holds one tensor, and the model takes {[*self._specs]}"
            raise PreprocessError(msg)
        (spec,) = self._specs.values()
        array = read_npy(data)
        if DATATYPES.get(array.dtype) is not spec.datatype:
            msg = f"{spec.name}: the model takes {spec.datatype}, and the file holds {array.dtype}"
            raise PreprocessError(msg)
        _check_shape(spec, list(array.shape))
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise PreprocessError(_describe_range(spec.name, spec.datatype))
        return {spec.name: array}


def build_tensor_input(params: Mapping[str, Any], manifest: Manifest, folder: Path) -> Preprocessor:
    """Return the step `tensor`, which takes no parameters.

    Raises:
        StepParamsError: parameters are given, or an input's datatype has no JSON form (BF16).
    """
    del folder
    parse_params("tensor", StepParams, params)
    return TensorInput(manifest)


def _check_shape(spec: TensorSpec, shape: object) -> None:
    """Refuse a shape that is no list of positive whole numbers or is not the model's."""
    if not isinstance(shape, list) or any(type(axis) is not int or axis < 1 for axis in shape):
        msg = f"{spec.name}: a shape is a list of whole numbers from 1, not {shape!r:.80}"
        raise PreprocessError(msg)
    if not is_shape_allowed(spec.shape, tuple(shape)):
        msg = f"{spec.name}: the model takes shape {list(spec.shape)}, not {shape!r:.80}"
        raise PreprocessError(msg)


def _flatten(data: object, shape: list[int], name: str) -> list[Any]:
    """Return row-major values, from a flat list or one nested exactly as `shape` says."""
    if not isinstance(data, list):
        msg = f"{name}: data must be a list"
        raise PreprocessError(msg)
    flat = data
    if len(shape) > 1 and data and isinstance(data[0], list):
        for length in shape[1:]:
            if any(type(row) is not list or len(row) != length for row in flat):
                msg = f"{name}: data is neither flat nor nested as its shape {shape} says"
                raise PreprocessError(msg)
            flat = list(chain.from_iterable(flat))
    if len(flat) != math.prod(shape):
        msg = f"{name}: shape {shape} holds {math.prod(shape)} values, and {len(flat)} came"
        raise PreprocessError(msg)
    return flat


Reader = Callable[[list[Any], str], Array]


def _get_reader(datatype: Datatype) -> Reader:
    """Return the function that turns a flat JSON list into a 1-D array of the datatype."""
    if datatype not in DTYPES:
        msg = f"step tensor: {datatype} has no JSON form"
        raise StepParamsError(msg)
    dtype = DTYPES[datatype]
    if dtype.kind == "f":
        return _build_float_reader(datatype, dtype)
    if dtype.kind in "iu":
        return _build_integer_reader(datatype, dtype)
    return _build_plain_reader(datatype, dtype, bool if dtype.kind == "b" else str)


def _build_float_reader(datatype: Datatype, dtype: np.dtype[Any]) -> Reader:
    numbers = {int, float}

    def read(flat: list[Any], name: str) -> Array:
        _check_types(flat, numbers, name, datatype)
        try:
            with np.errstate(over="ignore"):
                values = np.array(flat, dtype=dtype)
        except OverflowError as exc:
            raise PreprocessError(_describe_range(name, datatype)) from exc
        if not np.isfinite(values).all():
            raise PreprocessError(_describe_range(name, datatype))
        return values

    return read


def _build_integer_reader(datatype: Datatype, dtype: np.dtype[Any]) -> Reader:
    limits = np.iinfo(dtype)
    low, high = int(limits.min), int(limits.max)

    def read(flat: list[Any], name: str) -> Array:
        _check_types(flat, {int}, name, datatype)
        # NumPy before 2 wraps around instead of raising.
        if min(flat) < low or max(flat) > high:
            raise PreprocessError(_describe_range(name, datatype))
        return np.array(flat, dtype=dtype)

    return read


def _build_plain_reader(datatype: Datatype, dtype: np.dtype[Any], kind: type) -> Reader:
    def read(flat: list[Any], name: str) -> Array:
        _check_types(flat, {kind}, name, datatype)
        return np.array(flat, dtype=dtype)

    return read


def _check_types(flat: list[Any], allowed: set[type], name: str, datatype: Datatype) -> None:
    # By `type`, not isinstance: True is an int to isinstance.
    found = set(map(type, flat))
    if not found <= allowed:
        wrong = ", ".join(sorted(kind.__name__ for kind in found - allowed))
        msg = f"{name}: {datatype} data holds {wrong} (flat data, or nested as the shape says)"
        raise PreprocessError(msg)


def _describe_range(name: str, datatype: Datatype) -> str:
    return f"{name}: a value is NaN, infinite or out of the range of {datatype}"


def read_npy(data: bytes) -> Array:
    """Return the array in a `.npy` file's bytes, in native byte order, as a new array.

    Raises:
        PreprocessError: it is no such file, holds objects, or its size is not its shape's.
    """
    match, start = _match_npy_header(data)
    try:
        dtype = np.dtype(match[1])
    except TypeError as exc:
        msg = f"the .npy file holds {match[1]}, which NumPy does not know"
        raise PreprocessError(msg) from exc
    shape = tuple(int(axis) for axis in match[3].replace(",", " ").split())
    if dtype.hasobject or dtype.itemsize * math.prod(shape) != len(data) - start or 0 in shape:
        msg = f"the .npy file of {len(data)} bytes cannot hold {match[1]} of shape {list(shape)}"
        raise PreprocessError(msg)
    array = np.frombuffer(data, dtype=dtype, offset=start)
    native = array.astype(dtype.newbyteorder("="))
    order: Literal["C", "F"] = "F" if match[2] == "True" else "C"
    return np.asarray(native.reshape(shape, order=order), order="C")


def _match_npy_header(data: bytes) -> tuple[re.Match[str], int]:
    """Return the matched header and where the values start."""
    # Version 1 has a length of 2 bytes, versions 2 and 3 one of 4.
    width = 2 if data[6:7] == b"\x01" else 4
    start = 8 + width + int.from_bytes(data[8 : 8 + width], "little")
    match = None
    if data[:6] == _NPY_MAGIC and data[6:7] in {b"\x01", b"\x02", b"\x03"}:
        header = data[8 + width : min(start, _NPY_HEADER_MAX_BYTES)]
        match = _NPY_HEADER.fullmatch(header.decode("latin-1"))
    if match is None:
        msg = "the bytes are no .npy file of plain numbers, as numpy.save writes it"
        raise PreprocessError(msg)
    return match, start


class TensorOutput:
    """Writes arrays as the `outputs` of an Open Inference Protocol response."""

    def __call__(
        self, outputs: Mapping[str, Array], value: Any, params: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Return `{"outputs": [{"name", "datatype", "shape", "data"}]}`, data flat, row-major.

        Raises:
            NanOutputError: a value is NaN or infinite.
            OutputError: the step before did not leave arrays.
        """
        del outputs, params
        return {"outputs": [_encode_tensor(name, array) for name, array in value.items()]}


def build_tensor_output(
    params: Mapping[str, Any], manifest: Manifest, folder: Path
) -> Postprocessor:
    """Return the step `tensors`, which takes no parameters.

    Raises:
        StepParamsError: parameters are given.
    """
    del manifest, folder
    parse_params("tensors", StepParams, params)
    return TensorOutput()


def _encode_tensor(name: str, array: object) -> dict[str, Any]:
    if not isinstance(array, np.ndarray) or array.dtype not in DATATYPES:
        msg = f"{name} is no array that the protocol has a datatype for"
        raise OutputError(msg)
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        msg = f"{name} holds NaN or an infinite number, which JSON cannot carry"
        raise NanOutputError(msg)
    return {
        "name": name,
        "datatype": DATATYPES[array.dtype].value,
        "shape": list(array.shape),
        "data": array.ravel().tolist(),
    }
