"""The vocabulary of processing: a job's input, and what a step is.

A *factory* is called once, when a model is loaded: `build(params, manifest, folder)`.
What it returns is called for every request, by many threads at once.

Invariants: a factory raises only `StepError`s for what is wrong with a manifest, a
preprocessor only `PreprocessError`s for what is wrong with an input, a postprocessor
only `OutputError`s for what is wrong with an answer.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from agent.manifest import Manifest, Step
from platforms.runtimes.base import Array
from worker.errors import PreprocessError, StepParamsError


@dataclass(frozen=True)
class JobInput:
    """What a job brings: tensors as JSON, or the bytes of a file; exactly one of them."""

    tensors: list[Any] | None = None
    """As the `inputs` of an Open Inference Protocol request, not checked yet."""
    data: bytes | None = None


class Preprocessor(Protocol):
    """Turns a job's input into the model's input tensors."""

    def __call__(self, given: JobInput) -> dict[str, Array]:
        """Return an array per model input, with axis 0 as the batch; thread-safe.

        Raises:
            PreprocessError: the input cannot become these tensors.
        """


class Postprocessor(Protocol):
    """Turns a model's outputs, or the value of the step before it, into a new value."""

    def __call__(self, outputs: Mapping[str, Array], value: Any, params: Mapping[str, Any]) -> Any:
        """Return the next value: arrays by name, or at the end something JSON-ready.

        Args:
            outputs: the model's outputs for one request; axis 0 holds the request's rows.
            value: what the step before returned; the first step gets `outputs`.
            params: what the job itself asks for, such as `{"top_k": 3}`.

        Raises:
            OutputError: the outputs do not fit the step.
            PreprocessError: the job's own parameters are bad.
        """


class PreprocessorFactory(Protocol):
    """Builds a preprocessor for one model version."""

    def __call__(self, params: Mapping[str, Any], manifest: Manifest, folder: Path) -> Preprocessor:
        """Check the parameters and return the step.

        Raises:
            StepParamsError: the parameters, or the model's tensors, do not fit the step.
        """


class PostprocessorFactory(Protocol):
    """Builds a postprocessor for one model version."""

    def __call__(
        self, params: Mapping[str, Any], manifest: Manifest, folder: Path
    ) -> Postprocessor:
        """Check the parameters and return the step.

        Raises:
            StepParamsError: the parameters, or the model's tensors, do not fit the step.
        """


class StepParams(BaseModel):
    """Base of a step's parameters: unknown keys and inexact types are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


Params = TypeVar("Params", bound=StepParams)


def parse_params(step: str, kind: type[Params], params: Mapping[str, Any]) -> Params:
    """Check a step's parameters against their model.

    Raises:
        StepParamsError: a parameter is missing, unknown or has a bad value.
    """
    try:
        return kind.model_validate(dict(params))
    except ValidationError as exc:
        first = exc.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "(all)"
        msg = f"step {step}: parameter {where}: {first['msg']}"
        raise StepParamsError(msg) from exc


def get_bytes(given: JobInput, step: Step | str) -> bytes:
    """Return the bytes of an input that must be bytes.

    Raises:
        PreprocessError: the job brought none.
    """
    if given.data is None:
        msg = f"step {step} takes a file's bytes, and the job brought none"
        raise PreprocessError(msg)
    return given.data
