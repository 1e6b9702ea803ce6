"""How alike two sets of answers are: pure functions over arrays.

Owns the measures and their definitions; runs no model. "Reference" is what is trusted (the
original), "candidate" what is to stand in for it.

Invariants: arrays of both sides have the same shape and are computed in float64; NaN on
either side never counts as alike.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from platforms.errors import TensorError
from platforms.runtimes.base import Array

_Float = NDArray[np.float64]


@dataclass(frozen=True)
class Parity:
    """How alike one output is on both sides, over all rows."""

    name: str
    rows: int
    is_identical: bool
    """Every value is equal."""
    sqnr_db: float | None
    """Signal to quantization noise; infinite where identical, NaN where either side has NaN.

    None for texts, as the distances below."""
    max_abs: float | None
    mean_abs: float | None
    cosine: float | None
    """Mean over rows."""
    top_1: float | None = None
    """Share of rows whose best class is the same, or of texts that are; None for other outputs."""
    top_k: float | None = None
    """Share of rows whose reference's best is among the candidate's `k` best."""
    k: int | None = None

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-ready form; what is infinite or no number is null."""
        return {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in asdict(self).items()
        }


def compare_output(name: str, reference: Array, candidate: Array, k: int = 5) -> Parity:
    """Measure one output of both sides.

    Args:
        name: the output's.
        reference: any shape, axis 0 the rows; numbers or booleans, or texts (equal or not).
        candidate: of the same shape.
        k: for `top_k`.

    Raises:
        TensorError: the shapes differ, or only one side has numbers.
    """
    if reference.shape != candidate.shape:
        msg = (
            f"{name}: shape {list(reference.shape)} cannot be compared with {list(candidate.shape)}"
        )
        raise TensorError(msg)
    if _is_text(reference) or _is_text(candidate):
        return _compare_texts(name, reference, candidate)
    left, right = reference.astype(np.float64), candidate.astype(np.float64)
    # What is infinite makes distances that are infinite or no number, and is seen by them.
    with np.errstate(invalid="ignore", over="ignore"):
        return _compare_numbers(name, left, right, k, is_scores=is_class_scores(reference))


def _compare_numbers(name: str, left: _Float, right: _Float, k: int, *, is_scores: bool) -> Parity:
    k = min(k, left.shape[1]) if is_scores else k
    return Parity(
        name=name,
        rows=len(left) if left.ndim else 1,
        is_identical=bool(np.array_equal(left, right)),
        sqnr_db=compute_sqnr_db(left, right),
        max_abs=float(np.max(np.abs(left - right))),
        mean_abs=float(np.mean(np.abs(left - right))),
        cosine=compute_cosine(left, right),
        top_1=compute_top_k_agreement(left, right, 1) if is_scores else None,
        top_k=compute_top_k_agreement(left, right, k) if is_scores else None,
        k=k if is_scores else None,
    )


def _is_text(array: Array) -> bool:
    return array.dtype.kind in "OUS"


def _compare_texts(name: str, reference: Array, candidate: Array) -> Parity:
    if not (_is_text(reference) and _is_text(candidate)):
        msg = f"{name}: texts cannot be compared with numbers"
        raise TensorError(msg)
    equal = reference == candidate
    return Parity(
        name=name,
        rows=len(reference) if reference.ndim else 1,
        is_identical=bool(np.all(equal)),
        sqnr_db=None,
        max_abs=None,
        mean_abs=None,
        cosine=None,
        top_1=float(np.mean(equal)),
    )


def is_class_scores(array: Array) -> bool:
    """Say whether an output looks like one score per class: floats or integers `[N, C > 1]`."""
    return array.ndim == 2 and array.shape[1] > 1 and array.dtype.kind in "fiu"


def compute_sqnr_db(reference: _Float, candidate: _Float) -> float:
    """Return 10·log10(Σ reference² / Σ (reference − candidate)²).

    Infinite where both are equal; −infinite where the reference is 0 and the candidate is not.

    Source: ONNX Runtime's `onnxruntime.quantization.qdq_loss_debug.compute_signal_to_quantization_
    noice_ratio`, whose 20·log10 of norms is the same.
    """
    if np.isnan(reference).any() or np.isnan(candidate).any():
        return math.nan
    noise = float(np.sum((reference - candidate) ** 2))
    signal = float(np.sum(reference**2))
    if noise == 0:
        return math.inf
    return -math.inf if signal == 0 else 10 * math.log10(signal / noise)


def compute_cosine(reference: _Float, candidate: _Float) -> float:
    """Return the mean over rows of the angle's cosine; two rows of zeros count as 1."""
    left = reference.reshape(len(reference), -1) if reference.ndim else reference.reshape(1, 1)
    right = candidate.reshape(left.shape)
    product = np.sum(left * right, axis=1)
    norms = np.linalg.norm(left, axis=1) * np.linalg.norm(right, axis=1)
    both_zero = ~left.any(axis=1) & ~right.any(axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        cosines = np.where(norms > 0, product / norms, both_zero.astype(np.float64))
    has_nan = np.isnan(left).any(axis=1) | np.isnan(right).any(axis=1)
    return float(np.mean(np.where(has_nan, np.nan, cosines)))


def compute_top_k_agreement(reference: _Float, candidate: _Float, k: int) -> float:
    """Return the share of rows whose reference's best class is among the candidate's `k` best.

    Of equal scores the lower class counts as better on both sides, so a candidate that answers
    the same for every class agrees by chance only. A row with NaN on either side disagrees.

    Args:
        reference: `float64[N, C]`.
        candidate: `float64[N, C]`.
        k: from 1 to C; with C every row agrees.
    """
    best = np.argmax(reference, axis=1)
    mine = candidate[np.arange(len(best)), best][:, None]
    classes = np.arange(candidate.shape[1])[None, :]
    is_before = (candidate > mine) | ((candidate == mine) & (classes < best[:, None]))
    agrees = is_before.sum(axis=1) < k
    is_number = ~(np.isnan(reference).any(axis=1) | np.isnan(candidate).any(axis=1))
    return float(np.mean(agrees & is_number))


def find_worst(parities: Sequence[Parity]) -> tuple[float | None, float]:
    """Return the lowest top-1 agreement (None: no output has one) and the lowest SQNR in dB.

    NaN counts as the lowest of all; the SQNR is infinite where no output has one.
    """
    agreements = [item.top_1 for item in parities if item.top_1 is not None]
    levels = [
        -math.inf if math.isnan(item.sqnr_db) else item.sqnr_db
        for item in parities
        if item.sqnr_db is not None
    ]
    return min(agreements, default=None), min(levels, default=math.inf)


class Likeness(StrEnum):
    """How alike two models are, in a word."""

    IDENTICAL = "identical"
    ROUNDING = "equal but for rounding"
    ALIKE = "alike"
    SIMILAR = "similar"
    DIFFERENT = "different"


LIKENESS_BOUNDS: tuple[tuple[Likeness, float, float], ...] = (
    (Likeness.ROUNDING, 1.0, 60.0),
    (Likeness.ALIKE, 0.99, 20.0),
    (Likeness.SIMILAR, 0.95, 10.0),
)
"""Lowest top-1 agreement (where there are classes) and lowest SQNR in dB of each. An orientation
for a person, set by us; whoever gates on figures gives limits of his own."""


def judge_likeness(parities: Sequence[Parity]) -> Likeness:
    """Return the best word that every output deserves."""
    if all(item.is_identical for item in parities):
        return Likeness.IDENTICAL
    agreement, sqnr_db = find_worst(parities)
    for likeness, min_agreement, min_sqnr_db in LIKENESS_BOUNDS:
        if (agreement is None or agreement >= min_agreement) and sqnr_db >= min_sqnr_db:
            return likeness
    return Likeness.DIFFERENT


FALLBACK_SQNR_DB = 20.0
"""Signal to noise that an output without classes needs where nothing else is asked."""


@dataclass(frozen=True)
class Bounds:
    """How far a candidate's answers may be from the reference's; None: not looked at.

    A measure that an output does not have (a best class, where it has no classes) is passed over;
    an output to which none applies needs `FALLBACK_SQNR_DB`.
    """

    min_top_1: float | None = None
    min_top_k: float | None = None
    min_sqnr_db: float | None = None
    max_abs: float | None = None


def list_objections(parity: Parity, bounds: Bounds) -> list[str]:
    """Return what of an output is outside the bounds, with its figure.

    NaN and infinity are outside of all, in one value of one row as well.
    """
    if parity.max_abs is not None and not math.isfinite(parity.max_abs):
        return [f"{parity.name}: it answers NaN or infinity"]
    found: list[str] = []
    is_judged = False
    for what, value, least, unit in (
        ("agreement", parity.top_1, bounds.min_top_1, ""),
        ("top-5 agreement", parity.top_k, bounds.min_top_k, ""),
        ("SQNR", parity.sqnr_db, bounds.min_sqnr_db, " dB"),
    ):
        if least is None or value is None:
            continue
        is_judged = True
        if not value >= least:
            found.append(f"{parity.name}: {what} {value:.4g}{unit}, at least {least:g} asked")
    if bounds.max_abs is not None and parity.max_abs is not None:
        is_judged = True
        if not parity.max_abs <= bounds.max_abs:
            off = f"off by {parity.max_abs:.4g}, at most {bounds.max_abs:g} asked"
            found.append(f"{parity.name}: {off}")
    if not is_judged and parity.sqnr_db is not None and not parity.sqnr_db >= FALLBACK_SQNR_DB:
        level = f"SQNR {parity.sqnr_db:.4g} dB, at least {FALLBACK_SQNR_DB:g} asked"
        found.append(f"{parity.name}: {level}")
    return found
