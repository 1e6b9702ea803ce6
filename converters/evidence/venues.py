"""Where an artifact is tried: a runtime, and the Python that it is installed in.

Owns the two venues that no registry of this process knows: tflite-runtime 2.14, which needs an
environment of its own (Python 3.11, NumPy below 2), and the reference interpreter that stands in
for Core ML where there is none. Loads no runtime.
"""

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from converters.task import ModelFormat
from platforms.artifact import ArtifactFormat
from platforms.runtimes.registry import RUNTIME_FORMATS

MIL_REFERENCE = "mil-reference"
MIL_LABEL = "reference interpreter, not Core ML"
_MIL_TARGET = "converters.evidence.mil_runtime:MilReference"
_MIL_NEEDS = ("coremltools", "torch")

TFLITE_RUNTIME = "tflite-runtime"
_LITERT, _COREML = "litert", "coreml"

_FORMATS: Mapping[ModelFormat, ArtifactFormat] = {
    ModelFormat(known.value): known for known in ArtifactFormat if known is not ArtifactFormat.V2
}


@dataclass(frozen=True)
class Venue:
    """One place to try an artifact in."""

    name: str
    """As proofs and reports call it."""
    runtime: str
    """The adapter's name."""
    label: str = ""
    """What a reader must know of it, such as that it is no real runtime."""
    target: str | None = None
    """`package.module:Class` of an adapter that is not registered."""
    interpreter: Path | None = None
    """The Python of the environment it is installed in; None: this one."""
    is_timed: bool = True
    """False: how long it takes says nothing of any box."""


def get_venue(name: str) -> Venue:
    """Return the venue of this process's environment with this name."""
    if name == MIL_REFERENCE:
        return Venue(MIL_REFERENCE, MIL_REFERENCE, MIL_LABEL, _MIL_TARGET, is_timed=False)
    return Venue(name, name)


def make_legacy_venue(interpreter: Path) -> Venue:
    """Return tflite-runtime as it is installed for another Python.

    Args:
        interpreter: of an environment with tflite-runtime, NumPy < 2 and psutil, without
            ai-edge-litert, which would be taken first.
    """
    return Venue(TFLITE_RUNTIME, _LITERT, "the older TFLite runtime", interpreter=interpreter)


def find_runtimes(model_format: ModelFormat, present: Sequence[str]) -> list[str]:
    """Return the names of what reads a format here, as the registry lists them.

    Where Core ML is absent its reference interpreter stands in, if its packages are installed.

    Args:
        model_format: of the artifact; none that only a converter reads has a runtime.
        present: the registered runtimes that are installed.
    """
    wanted = _FORMATS.get(model_format)
    found = [
        name for name, formats in RUNTIME_FORMATS.items() if wanted in formats and name in present
    ]
    if wanted is ArtifactFormat.COREML and _COREML not in found and _has_mil_reference():
        found.append(MIL_REFERENCE)
    return found


def find_venues(
    model_format: ModelFormat, present: Sequence[str], legacy: Path | None = None
) -> list[Venue]:
    """Return all venues of a format.

    Args:
        model_format: of the artifact.
        present: the registered runtimes that are installed.
        legacy: as `make_legacy_venue` takes it; None: tflite-runtime is not tried.
    """
    found = [get_venue(name) for name in find_runtimes(model_format, present)]
    if legacy is not None and model_format is ModelFormat.TFLITE:
        found.append(make_legacy_venue(legacy))
    return found


def _has_mil_reference() -> bool:
    return all(importlib.util.find_spec(name) for name in _MIL_NEEDS)
