"""The golden set: inputs with known answers, and whether found answers are right.

Owns the reading of a version's golden set and the verdict by its tolerance; runs no model.
Where a version brings none, made-up inputs stand in: they prove that it runs, and let two
versions be compared, and no more.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from agent.choice import Agreement
from agent.errors import ManifestError
from agent.manifest import Manifest, Tolerance
from platforms.errors import TensorError
from platforms.measuring.sample import make_random_inputs
from platforms.parity import Bounds, Parity, compare_output, list_objections
from platforms.runtimes.base import Array

MADE_UP_ROWS = 8
ROWS_MAX = 256
"""A golden set may be longer; so many rows are enough to tell, and bounded in time."""


@dataclass(frozen=True)
class GoldenSet:
    """Inputs, and the answers to them where they are known."""

    inputs: Mapping[str, Array]
    outputs: Mapping[str, Array] | None
    """None: the inputs are made up."""
    rows: int


def load_golden(manifest: Manifest, folder: Path) -> GoldenSet:
    """Read a version's golden set, or make inputs up.

    Raises:
        ManifestError: its files are no arrays of the manifest's tensors, with as many rows each.
    """
    if manifest.golden is None:
        specs = [entry.to_spec() for entry in manifest.inputs]
        try:
            made = make_random_inputs(specs, MADE_UP_ROWS)
        except TensorError as exc:
            raise ManifestError(f"no inputs can be made up: {exc}") from exc
        return GoldenSet(made, None, MADE_UP_ROWS)
    inputs = _read(folder / manifest.golden.inputs, [entry.name for entry in manifest.inputs])
    outputs = _read(folder / manifest.golden.outputs, [entry.name for entry in manifest.outputs])
    lengths = {len(array) for array in (*inputs.values(), *outputs.values())}
    if len(lengths) != 1 or 0 in lengths:
        msg = f"golden: the arrays have {sorted(lengths)} rows; all must have as many, and some"
        raise ManifestError(msg)
    rows = min(lengths.pop(), ROWS_MAX)
    return GoldenSet(_cut(inputs, rows), _cut(outputs, rows), rows)


def _read(path: Path, names: list[str]) -> dict[str, Array]:
    try:
        with np.load(path, allow_pickle=False) as found:
            arrays = {name: found[name] for name in names}
    except (OSError, ValueError, KeyError) as exc:
        msg = f"golden: {path.name} has not the arrays {', '.join(names)}: {exc}"
        raise ManifestError(msg) from exc
    if any(array.ndim == 0 for array in arrays.values()):
        msg = f"golden: an array in {path.name} has no rows"
        raise ManifestError(msg)
    texts = {k: v.astype(object) if v.dtype.kind in "US" else v for k, v in arrays.items()}
    return texts


def _cut(arrays: Mapping[str, Array], rows: int) -> dict[str, Array]:
    return {name: array[:rows] for name, array in arrays.items()}


def compare(
    reference: Mapping[str, Array], found: Mapping[str, Array], tolerance: Tolerance
) -> tuple[Agreement, str]:
    """Return how alike two sets of answers are, and what is outside the tolerance, or nothing.

    The worst output counts.
    """
    parities: list[Parity] = []
    complaints: list[str] = []
    for name, right in reference.items():
        if name not in found:
            complaints.append(f"there is no output {name!r}")
            continue
        try:
            parity = compare_output(name, right, found[name])
        except TensorError as exc:
            complaints.append(str(exc))
            continue
        parities.append(parity)
        complaints += list_objections(parity, to_bounds(tolerance))
    return _merge(parities), "; ".join(complaints)


def to_bounds(tolerance: Tolerance) -> Bounds:
    """Return a manifest's tolerance in the platform layer's form."""
    return Bounds(
        tolerance.min_agreement, tolerance.min_top_5, tolerance.min_sqnr_db, tolerance.max_abs
    )


def _merge(parities: list[Parity]) -> Agreement:
    def worst(values: list[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        return min(known, default=None)

    sqnr = worst([item.sqnr_db for item in parities])
    return Agreement(
        rows=max((item.rows for item in parities), default=0),
        top_1=worst([item.top_1 for item in parities]),
        top_5=worst([item.top_k for item in parities]),
        sqnr_db=sqnr if sqnr is not None and np.isfinite(sqnr) else None,
        max_abs=max((v for item in parities if (v := item.max_abs) is not None), default=None),
    )
