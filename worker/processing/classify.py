"""The steps `softmax` and `top_k`: from a classifier's scores to labels.

Owns nothing but the arithmetic and the labels. Where a manifest names a labels file,
it must be one that the manifest also gives a digest for.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field, TypeAdapter, ValidationError, model_validator

from agent.manifest import Manifest
from platforms.runtimes.base import Array
from worker.errors import NanOutputError, OutputError, PreprocessError, StepParamsError
from worker.processing.step import Postprocessor, StepParams, parse_params

DEFAULT_K = 5
_MAX_K = 1000
_Count = Annotated[int, Field(ge=1, le=_MAX_K, strict=True)]
_COUNT: TypeAdapter[int] = TypeAdapter(_Count)


class SoftmaxParams(StepParams):
    """Parameters of the step `softmax`."""

    output: str | None = None
    """The output it applies to; may be left out where the model has one."""


class TopKParams(SoftmaxParams):
    """Parameters of the step `top_k`: labels in a file, one a line, or in the manifest."""

    k: _Count = DEFAULT_K
    labels: tuple[str, ...] | None = None
    labels_file: str | None = None

    @model_validator(mode="after")
    def _check_one_source(self) -> "TopKParams":
        if self.labels is not None and self.labels_file is not None:
            msg = "give labels or labels_file, not both"
            raise ValueError(msg)
        return self


class Softmax:
    """Turns one output's scores into probabilities along its last axis."""

    def __init__(self, name: str) -> None:
        """Keep the output's name."""
        self._name = name

    def __call__(
        self, outputs: Mapping[str, Array], value: Any, params: Mapping[str, Any]
    ) -> dict[str, Array]:
        """Return the arrays of `value` with the named one as `float32[..., C]`, sums of 1.

        Raises:
            NanOutputError: the scores have no softmax (NaN, or infinity).
            OutputError: the step before did not leave that array.
        """
        del outputs, params
        scores = _get_array(value, self._name).astype(np.float32, copy=False)
        with np.errstate(invalid="ignore"):
            powers = np.exp(scores - scores.max(axis=-1, keepdims=True))
            shares = powers / powers.sum(axis=-1, keepdims=True)
        if np.isnan(shares).any():
            msg = f"{self._name} holds NaN or infinity: it has no softmax"
            raise NanOutputError(msg)
        return {**value, self._name: shares}


class TopK:
    """Names the best classes of one output."""

    def __init__(self, name: str, k: int, labels: tuple[str, ...] | None) -> None:
        """Keep the output's name and the labels in the order of its classes."""
        self._name = name
        self._k = k
        self._labels = labels

    @property
    def labels(self) -> dict[str, tuple[str, ...]]:
        """The classes' names by output; empty where they have none."""
        return {self._name: self._labels} if self._labels else {}

    def __call__(
        self, outputs: Mapping[str, Array], value: Any, params: Mapping[str, Any]
    ) -> list[Any]:
        """Return `[{"label", "index", "score"}]`, best first; equal scores by lower index.

        A request of several rows gets a list of such lists. The job's own
        `{"top_k": n}` takes the place of the manifest's k.

        Raises:
            NanOutputError: a score is NaN or infinite.
            OutputError: the output is not `[N, C]` with one label for each class.
            PreprocessError: the job's `top_k` is no whole number from 1 to 1000.
        """
        del outputs
        k = self._k if "top_k" not in params else _check_count(params["top_k"])
        scores = _get_array(value, self._name)
        if scores.ndim != 2 or (self._labels and scores.shape[1] != len(self._labels)):
            wanted = len(self._labels) if self._labels else "C"
            msg = f"{self._name} has shape {list(scores.shape)}, top_k takes [N, {wanted}]"
            raise OutputError(msg)
        if scores.dtype.kind == "f" and not np.isfinite(scores).all():
            msg = f"{self._name} holds NaN or an infinite score"
            raise NanOutputError(msg)
        rows = [self._rank(row, k) for row in scores]
        return rows[0] if len(rows) == 1 else rows

    def _rank(self, row: Array, k: int) -> list[dict[str, Any]]:
        best = np.argsort(-row.astype(np.float64), kind="stable")[:k].tolist()
        labels = self._labels
        return [
            {
                "label": labels[index] if labels else str(index),
                "index": index,
                "score": row[index].item(),
            }
            for index in best
        ]


def build_softmax(params: Mapping[str, Any], manifest: Manifest, folder: Path) -> Postprocessor:
    """Return the step `softmax`.

    Raises:
        StepParamsError: a parameter is bad or names no output.
    """
    del folder
    parsed = parse_params("softmax", SoftmaxParams, params)
    return Softmax(_get_output(parsed, manifest))


def build_top_k(params: Mapping[str, Any], manifest: Manifest, folder: Path) -> Postprocessor:
    """Return the step `top_k`.

    Raises:
        StepParamsError: a parameter is bad, names no output, or the labels cannot be
            read or are not as many as the output's classes.
    """
    parsed = parse_params("top_k", TopKParams, params)
    name = _get_output(parsed, manifest)
    labels = parsed.labels
    if parsed.labels_file is not None:
        labels = _read_labels(parsed.labels_file, manifest, folder)
    shape = next(entry.shape for entry in manifest.outputs if entry.name == name)
    if labels is not None and shape and shape[-1] not in {-1, len(labels)}:
        msg = f"step top_k: {len(labels)} labels for {shape[-1]} classes"
        raise StepParamsError(msg)
    return TopK(name, parsed.k, labels)


def _get_output(params: SoftmaxParams, manifest: Manifest) -> str:
    names = [entry.name for entry in manifest.outputs]
    if params.output is None and len(names) == 1:
        return names[0]
    if params.output in names:
        return params.output
    msg = f"parameter output must be one of {', '.join(names)}, not {params.output!r}"
    raise StepParamsError(msg)


def _read_labels(file: str, manifest: Manifest, folder: Path) -> tuple[str, ...]:
    if file not in manifest.files:
        msg = f"step top_k: labels file {file!r} is not among the manifest's files"
        raise StepParamsError(msg)
    try:
        return tuple((folder / file).read_text(encoding="utf-8").splitlines())
    except (OSError, UnicodeDecodeError) as exc:
        msg = f"step top_k: labels file {file} cannot be read: {exc}"
        raise StepParamsError(msg) from exc


def _get_array(value: Any, name: str) -> Array:
    array = value.get(name) if isinstance(value, Mapping) else None
    if not isinstance(array, np.ndarray) or not array.ndim:
        msg = f"the step before left no array {name}"
        raise OutputError(msg)
    return array


def _check_count(count: object) -> int:
    try:
        return _COUNT.validate_python(count)
    except ValidationError as exc:
        msg = f"top_k must be a whole number from 1 to {_MAX_K}, not {count!r:.40}"
        raise PreprocessError(msg) from exc
