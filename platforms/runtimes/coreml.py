"""Core ML behind `Runtime`: macOS only.

Owns the mapping of an ML program's tensors to specs and the choice of compute units.
Core ML itself is part of macOS: on any other system this runtime is missing, and says so.
A run cannot be stopped.

Not run on hardware: written from coremltools 9.0's documentation
(https://apple.github.io/coremltools/docs-guides/source/model-prediction.html).
"""

import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import numpy as np

from platforms.artifact import ArtifactFormat, Datatype, TensorSpec, locate_model
from platforms.errors import InferenceError, ModelLoadError, RuntimeMissingError
from platforms.runtimes.base import (
    CPU_PROVIDER,
    DTYPES,
    Array,
    LoadOptions,
    RunStop,
    Runtime,
    Session,
)

_MACOS = "darwin"
_COMPUTE_UNITS = {
    "CPU_AND_NE": "CPU_AND_NE",
    "CPU_AND_GPU": "CPU_AND_GPU",
    "ALL": "ALL",
    CPU_PROVIDER: "CPU_ONLY",
}
_ERRORS = (RuntimeError, ValueError, TypeError, KeyError, OSError)

# FeatureTypes.proto's ArrayFeatureType.ArrayDataType of coremltools 9.0.
_DATATYPES = {
    65552: Datatype.FP16,
    65568: Datatype.FP32,
    65600: Datatype.FP64,
    131104: Datatype.INT32,
}


class CoremlSession(Session):
    """An `MLModel`; one prediction at a time, Core ML promises no more."""

    def __init__(self, model: Any, provider: str, inputs: Any, outputs: Any) -> None:
        """Take over a loaded model and the specs of its protobuf description."""
        super().__init__(CoremlRuntime.name, provider, inputs, outputs)
        self._model = model
        self._lock = threading.Lock()

    def _run(self, inputs: Mapping[str, Array], stop: RunStop | None) -> dict[str, Array]:
        with self._lock:
            if self._model is None:
                msg = "the session is closed"
                raise InferenceError(msg)
            try:
                found = self._model.predict(dict(inputs))
            except _ERRORS as exc:
                msg = f"Core ML failed: {exc}"
                raise InferenceError(msg) from exc
        return {
            spec.name: np.asarray(found[spec.name], DTYPES[spec.datatype]) for spec in self.outputs
        }

    def close(self) -> None:
        """Let go of the model, after a run that is going on."""
        with self._lock:
            self._model = None


class CoremlRuntime(Runtime):
    """Core ML, for `.mlpackage` folders and `.mlmodel` files, on macOS."""

    name: ClassVar[str] = "coreml"
    extra: ClassVar[str] = "convert"
    formats: ClassVar[frozenset[ArtifactFormat]] = frozenset({ArtifactFormat.COREML})

    def version(self) -> str:
        """Return coremltools' version."""
        return str(self._import_tools().__version__)

    def providers(self) -> tuple[str, ...]:
        """Return the sets of compute units, best first."""
        self._import_tools()
        return tuple(_COMPUTE_UNITS)

    def _import_tools(self) -> ModuleType:
        if sys.platform != _MACOS:
            absent = ModuleNotFoundError("the Core ML framework is part of macOS")
            msg = "runtime coreml: Core ML runs on macOS only; nothing to install here"
            raise RuntimeMissingError(msg) from absent
        return self.import_library("coremltools")

    def _load(self, path: Path, options: LoadOptions) -> Session:
        tools = self._import_tools()
        provider = next((name for name in options.providers if name in _COMPUTE_UNITS), None)
        if provider is None:
            msg = f"none of {options.providers} is a set of compute units: {list(_COMPUTE_UNITS)}"
            raise ModelLoadError(msg)
        try:
            units = getattr(tools.ComputeUnit, _COMPUTE_UNITS[provider])
            model = tools.models.MLModel(str(locate_model(path)), compute_units=units)
            description = model.get_spec().description
        except _ERRORS as exc:
            msg = f"Core ML refuses {path.name}: {exc}"
            raise ModelLoadError(msg) from exc
        inputs, outputs = read_specs(description.input), read_specs(description.output)
        return CoremlSession(model, provider, inputs, outputs)


def read_specs(features: Any) -> tuple[TensorSpec, ...]:
    """Return the specs of a model description's features (`FeatureDescription` messages).

    Raises:
        ModelLoadError: one is no multi-array (an image, a dictionary), or of an unknown type.
    """
    return tuple(_to_spec(feature) for feature in features)


def _to_spec(feature: Any) -> TensorSpec:
    array = feature.type.multiArrayType
    if feature.type.WhichOneof("Type") != "multiArrayType" or array.dataType not in _DATATYPES:
        msg = f"{feature.name} is no plain tensor: convert the model with TensorType inputs"
        raise ModelLoadError(msg)
    shape = [int(axis) for axis in array.shape]
    for position, limits in enumerate(array.shapeRange.sizeRanges):
        if limits.upperBound != limits.lowerBound:
            shape[position] = -1
    return TensorSpec(feature.name, _DATATYPES[array.dataType], tuple(shape))
