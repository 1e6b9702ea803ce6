"""Inputs to measure with: random ones of the right element type, and rows made from few.

Imported by the measuring child, so it reaches NumPy and `platforms` only.

Invariants: the same seed makes the same arrays on every box.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from platforms.artifact import Datatype, TensorSpec
from platforms.errors import TensorError
from platforms.runtimes.base import DTYPES, Array

SEED = 20_260
_LARGEST = {Datatype.UINT8: 255, Datatype.BOOL: 1}
_LARGEST_OTHER = 100
"""Of the other whole numbers: most are token ids or counts, and a large one is out of a table."""
Shapes = Mapping[str, Sequence[int]]


def make_random_inputs(
    specs: Sequence[TensorSpec], rows: int, seed: int = SEED, shapes: Shapes | None = None
) -> dict[str, Array]:
    """Return one array per input: floats are standard normal, whole numbers small, texts `a0`….

    Args:
        specs: the model's inputs.
        rows: length of axis 0, where it is free.
        seed: of the generator.
        shapes: lengths by input name for other free axes, batch axis left out; else they are 1.

    Raises:
        TensorError: a datatype has no NumPy form, a shape does not fit the input, or there is none.
    """
    unknown = (shapes or {}).keys() - {spec.name for spec in specs}
    if unknown:
        msg = f"the model has no input {', '.join(sorted(unknown))}"
        raise TensorError(msg)
    rng = np.random.default_rng(seed)
    return {spec.name: _make_one(spec, rows, rng, (shapes or {}).get(spec.name)) for spec in specs}


def _make_one(
    spec: TensorSpec, rows: int, rng: np.random.Generator, given: Sequence[int] | None
) -> Array:
    if spec.datatype not in DTYPES:
        msg = f"{spec.name}: there are no random numbers of {spec.datatype}"
        raise TensorError(msg)
    shape = _fill_shape(spec, rows, given)
    dtype = DTYPES[spec.datatype]
    if dtype.hasobject:
        return np.array([f"a{n}" for n in range(int(np.prod(shape)))], dtype).reshape(shape)
    if dtype.kind == "f":
        return rng.standard_normal(shape).astype(dtype)
    return rng.integers(0, _LARGEST.get(spec.datatype, _LARGEST_OTHER) + 1, shape).astype(dtype)


def _fill_shape(spec: TensorSpec, rows: int, given: Sequence[int] | None) -> tuple[int, ...]:
    if given is None:
        first = rows if spec.has_free_batch else None
        axes = tuple(max(axis, 1) for axis in spec.shape)
        return axes if first is None else (first, *axes[1:])
    shape = (rows, *given) if spec.has_free_batch else tuple(given)
    fits = len(shape) == len(spec.shape) and all(
        want in (-1, have) for want, have in zip(spec.shape, shape, strict=True)
    )
    if not fits:
        msg = f"{spec.name}: the model takes {list(spec.shape)}, not {list(shape)}"
        raise TensorError(msg)
    return shape


def repeat_rows(inputs: Mapping[str, Array], rows: int) -> dict[str, Array]:
    """Return arrays of `rows` rows, the given ones over and over; axis 0 is the batch."""
    return {name: array[np.arange(rows) % len(array)] for name, array in inputs.items()}


def save_arrays(path: Path, arrays: Mapping[str, Array]) -> None:
    """Write arrays to an `.npz` file; texts as fixed-width text, so that nothing is pickled."""
    plain = {k: v.astype(np.str_) if v.dtype.hasobject else v for k, v in arrays.items()}
    # As one list: an input may be called `file`, as an argument of `savez` is.
    names = np.array([*plain], np.str_)
    numbered: dict[str, Any] = {f"a{n}": array for n, array in enumerate(plain.values())}
    np.savez(path, names=names, **numbered)


def load_arrays(path: Path) -> dict[str, Array]:
    """Read what `save_arrays` wrote."""
    with np.load(path, allow_pickle=False) as found:
        names = [str(name) for name in found["names"]]
        arrays = [found[f"a{n}"] for n in range(len(names))]
    return {
        name: array.astype(object) if array.dtype.kind == "U" else array
        for name, array in zip(names, arrays, strict=True)
    }
