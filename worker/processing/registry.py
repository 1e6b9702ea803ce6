"""Which processing steps exist, and building those that a manifest names.

Owns the built-in names and the reading of users' own, announced by a distribution in
the entry-point groups `edgeward.preprocess` and `edgeward.postprocess`; each entry
point names a factory. A built-in name cannot be taken over.

Invariants: a step's module is imported when a manifest names it and not before, and
a factory that cannot be loaded is an error that says why.
"""

import importlib
from collections.abc import Mapping
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import MappingProxyType
from typing import Any

from agent.manifest import Manifest, Step
from worker.errors import UnknownStepError
from worker.processing.step import Postprocessor, Preprocessor

PREPROCESS_GROUP = "edgeward.preprocess"
POSTPROCESS_GROUP = "edgeward.postprocess"

_BUILT_IN: Mapping[str, Mapping[str, str]] = MappingProxyType(
    {
        PREPROCESS_GROUP: {
            "tensor": "worker.processing.tensor:build_tensor_input",
            "image": "worker.processing.image:build_image",
            "byte_window": "worker.processing.window:build_byte_window",
        },
        POSTPROCESS_GROUP: {
            "tensors": "worker.processing.tensor:build_tensor_output",
            "softmax": "worker.processing.classify:build_softmax",
            "top_k": "worker.processing.classify:build_top_k",
        },
    }
)


def build_preprocessor(manifest: Manifest, folder: Path) -> Preprocessor:
    """Return the step that the manifest of the version in `folder` names.

    Raises:
        UnknownStepError: no such step is installed, or it cannot be loaded.
        StepParamsError: its parameters do not fit.
    """
    step = manifest.preprocess
    built: Preprocessor = _get_factory(PREPROCESS_GROUP, step)(step.params, manifest, folder)
    return built


def build_postprocessors(manifest: Manifest, folder: Path) -> tuple[Postprocessor, ...]:
    """Return the manifest's chain of steps, or the plain `tensors` where it names none.

    Raises:
        UnknownStepError: no such step is installed, or it cannot be loaded.
        StepParamsError: its parameters do not fit.
    """
    steps = manifest.postprocess or (Step(name="tensors"),)
    return tuple(
        _get_factory(POSTPROCESS_GROUP, step)(step.params, manifest, folder) for step in steps
    )


def is_built_in(manifest: Manifest) -> bool:
    """Say whether all of the manifest's postprocessing is ours."""
    return all(step.name in _BUILT_IN[POSTPROCESS_GROUP] for step in manifest.postprocess)


def _get_factory(group: str, step: Step) -> Any:
    if step.name in _BUILT_IN[group]:
        module, _, name = _BUILT_IN[group][step.name].partition(":")
        return getattr(importlib.import_module(module), name)
    found = tuple(entry_points(group=group, name=step.name))
    if len(found) == 1:
        return _load_factory(group, found[0])
    known = sorted({*_BUILT_IN[group], *(point.name for point in entry_points(group=group))})
    fault = "is announced by several distributions" if found else "is not installed"
    msg = f"step {step.name!r} of group {group} {fault}; known are {', '.join(known)}"
    raise UnknownStepError(msg)


def _load_factory(group: str, point: EntryPoint) -> Any:
    try:
        return point.load()
    except Exception as exc:
        # A user's module may raise anything while it is imported.
        msg = f"step {point.name!r} = {point.value} of group {group} cannot be loaded: {exc!r}"
        raise UnknownStepError(msg) from exc
