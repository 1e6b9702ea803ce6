"""The data that a quantizer watches a model on, and the golden rows kept apart from it.

Owns reading it from a folder of pictures, an `.npz` or JSON lines, the choice of samples, and the
file that tools get it in. Decodes no picture itself: the caller brings the step that serves them,
so that a model is calibrated on what it will be given.

Invariants: the same path, count and seed choose the same samples on every box; every sample fits
the model's inputs and is finite; of pictures and lines no more than asked for are in memory.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from converters.errors import CalibrationError
from converters.task import Facts
from platforms.artifact import TensorSpec
from platforms.measuring.sample import load_arrays, save_arrays
from platforms.runtimes.base import DTYPES, Array, is_shape_allowed

DEFAULT_SAMPLES = 128
"""From here on more pictures moved the SQNR of the digits CNN by 0.6 dB at most
(docs/conversion.md, "Calibration"), and time grows with them."""

MIN_SAMPLES = 8
"""Fewer say little about the range of an activation: one bright picture would set it."""

DEFAULT_GOLDEN_ROWS = 64
SEED = 20_260

PICTURES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm"})

_MAX_LINE_BYTES = 64 << 20
_MAX_NAMED = 5

Preprocess = Callable[[bytes], Mapping[str, Array]]
"""From a picture's bytes to the model's inputs, a batch of one; raises `CalibrationError` for
bytes that are no picture."""


@dataclass(frozen=True)
class CalibrationSet:
    """Samples for a model."""

    inputs: Mapping[str, Array]
    """By input name; axis 0 counts the samples. Behind it stand the input's axes without its
    batch axis or, where `is_whole` says so, all of them."""
    facts: Facts
    """Where they come from, how many there were, how many are used and how they were chosen."""
    is_whole: Mapping[str, bool] = field(default_factory=dict)

    @property
    def samples(self) -> int:
        """How many there are."""
        return min((len(array) for array in self.inputs.values()), default=0)

    def save(self, path: Path) -> Path:
        """Write the arrays to an `.npz` file that `read_calibration` reads."""
        save_arrays(path, self.inputs)
        return path

    def take(self, rows: slice) -> "CalibrationSet":
        """Return some of the samples."""
        part = {name: array[rows] for name, array in self.inputs.items()}
        used = min((len(array) for array in part.values()), default=0)
        return CalibrationSet(part, {**self.facts, "used": used}, self.is_whole)

    def iter_feeds(self, specs: Sequence[TensorSpec]) -> Iterator[dict[str, Array]]:
        """Yield what one run takes: one sample, or as many as a fixed batch holds.

        What is left over at the end of a fixed batch is dropped.

        Args:
            specs: the model's inputs, whose names may differ from the set's: see `adapt`.
        """
        step = max(
            (_fixed_batch(spec) for spec in specs if not self.is_whole[spec.name]), default=1
        )
        for start in range(0, self.samples - step + 1, step):
            yield {
                spec.name: self.inputs[spec.name][start]
                if self.is_whole[spec.name]
                else self.inputs[spec.name][start : start + step]
                for spec in specs
            }


def _fixed_batch(spec: TensorSpec) -> int:
    return spec.shape[0] if spec.shape and spec.shape[0] > 0 else 1


def load_calibration(
    path: Path,
    specs: Sequence[TensorSpec],
    preprocess: Preprocess | None = None,
    samples: int = DEFAULT_SAMPLES,
    seed: int = SEED,
    min_samples: int = MIN_SAMPLES,
) -> CalibrationSet:
    """Read samples for a model; blocks while files are read.

    Args:
        path: a folder of pictures (sub-folders included); an `.npz` with one array per input,
            samples along axis 0; or a `.jsonl`, one sample a line, `{"input name": nested list}`.
        specs: the model's inputs.
        preprocess: needed for pictures.
        samples: at most so many are used, chosen at random by `seed` where there are more.
        seed: of the choice.
        min_samples: fewer are refused.

    Raises:
        CalibrationError: there is nothing, too little, or it does not fit the model.
    """
    if path.is_dir():
        found = _read_pictures(path, specs, preprocess, samples, seed)
    elif path.suffix == ".npz":
        found = _read_npz(path, specs, samples, seed)
    elif path.suffix in {".jsonl", ".ndjson"}:
        found = _read_lines(path, specs, samples, seed)
    else:
        msg = f"{path}: calibration data is a folder of pictures, an .npz or a .jsonl file"
        raise CalibrationError(msg)
    if found.samples < min_samples:
        msg = (
            f"{path}: {found.samples} usable samples, at least {min_samples} are needed to know "
            "the range of the activations"
        )
        raise CalibrationError(msg)
    return found


def read_calibration(path: Path, specs: Sequence[TensorSpec]) -> CalibrationSet:
    """Read what `CalibrationSet.save` wrote, for tools: all of it, and checked again.

    Raises:
        CalibrationError: it does not fit these inputs.
    """
    try:
        arrays = load_arrays(path)
    except (OSError, ValueError, KeyError) as exc:
        msg = f"{path} is no calibration file: {exc}"
        raise CalibrationError(msg) from exc
    used = min((len(array) for array in arrays.values()), default=0)
    return adapt(CalibrationSet(arrays, {"source": path.name, "used": used}), specs)


def adapt(found: CalibrationSet, specs: Sequence[TensorSpec]) -> CalibrationSet:
    """Return the set under the names of `specs`: by name, or else by order.

    Formats rename inputs on the way (`x` becomes `serving_default_x:0`); the order stays.

    Raises:
        CalibrationError: there are more or fewer arrays than inputs, or one does not fit.
    """
    names = _match_names([*found.inputs], specs)
    inputs, is_whole = {}, {}
    for spec in specs:
        array = found.inputs[names[spec.name]]
        inputs[spec.name], is_whole[spec.name] = _fit(spec, array)
    lengths = {len(array) for array in inputs.values()}
    if len(lengths) != 1:
        msg = f"the inputs have {sorted(lengths)} samples; all must have as many"
        raise CalibrationError(msg)
    return CalibrationSet(inputs, found.facts, is_whole)


def _match_names(names: list[str], specs: Sequence[TensorSpec]) -> dict[str, str]:
    wanted = [spec.name for spec in specs]
    if set(wanted) <= set(names):
        return {name: name for name in wanted}
    if len(names) == len(wanted) and not set(wanted) & set(names):
        return dict(zip(wanted, names, strict=True))
    msg = f"the model takes {', '.join(wanted)}, and the data has {', '.join(names) or 'nothing'}"
    raise CalibrationError(msg)


def _fit(spec: TensorSpec, array: Array) -> tuple[Array, bool]:
    """Return the samples in the input's element type, and whether each is a whole input."""
    is_whole = not (
        len(spec.shape) > 0
        and array.ndim == len(spec.shape)
        and is_shape_allowed(spec.shape[1:], array.shape[1:])
    )
    if is_whole and not (array.ndim > 0 and is_shape_allowed(spec.shape, array.shape[1:])):
        msg = (
            f"{spec.name}: samples of shape {list(array.shape[1:])} do not fit the model's "
            f"{list(spec.shape)}"
        )
        raise CalibrationError(msg)
    dtype = DTYPES.get(spec.datatype)
    if dtype is None or not np.can_cast(array.dtype, dtype, "same_kind"):
        msg = f"{spec.name}: the model takes {spec.datatype}, and the data holds {array.dtype}"
        raise CalibrationError(msg)
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        msg = f"{spec.name}: the data holds NaN or infinity"
        raise CalibrationError(msg)
    return array.astype(dtype, copy=False), is_whole


def choose(found: int, wanted: int, seed: int = SEED) -> list[int]:
    """Return which of `found` samples are used: all, or `wanted` at random, in random order.

    At random because files are often sorted by class; in random order so that any first part is
    as good a sample as the whole.
    """
    order = np.random.default_rng(seed).permutation(found)
    return [int(index) for index in order[:wanted]]


def _tell(source: str, found: int, used: int, seed: int) -> dict[str, Any]:
    chosen = "all" if used >= found else "at random"
    return {"source": source, "found": found, "used": used, "chosen": chosen, "seed": seed}


def _read_pictures(
    folder: Path,
    specs: Sequence[TensorSpec],
    preprocess: Preprocess | None,
    samples: int,
    seed: int,
) -> CalibrationSet:
    files = sorted(
        path for path in folder.rglob("*") if path.suffix.lower() in PICTURES and path.is_file()
    )
    if not files:
        msg = f"{folder} holds no pictures ({', '.join(sorted(PICTURES))})"
        raise CalibrationError(msg)
    if preprocess is None:
        msg = f"{folder}: pictures need the model's preprocessing step; give an .npz instead"
        raise CalibrationError(msg)
    rows: list[Mapping[str, Array]] = []
    unreadable: list[str] = []
    for index in choose(len(files), len(files), seed):
        if len(rows) == samples:
            break
        try:
            rows.append(preprocess(files[index].read_bytes()))
        except (CalibrationError, OSError) as exc:
            unreadable.append(f"{files[index].relative_to(folder)}: {exc}")
    if not rows:
        msg = f"{folder}: none of {len(files)} pictures can be read, such as {unreadable[0]}"
        raise CalibrationError(msg)
    arrays = {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}
    facts = _tell("pictures", len(files), len(rows), seed)
    if unreadable:
        facts |= {"unreadable": len(unreadable), "such_as": unreadable[:_MAX_NAMED]}
    return adapt(CalibrationSet(arrays, facts), specs)


def _read_npz(path: Path, specs: Sequence[TensorSpec], samples: int, seed: int) -> CalibrationSet:
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except (OSError, ValueError) as exc:
        msg = f"{path} is no .npz of plain arrays: {exc}"
        raise CalibrationError(msg) from exc
    if not arrays or any(array.ndim == 0 or not len(array) for array in arrays.values()):
        msg = f"{path} holds an array without samples, or none at all"
        raise CalibrationError(msg)
    whole = adapt(CalibrationSet(arrays, {}), specs)
    chosen = choose(whole.samples, samples, seed)
    inputs = {name: array[chosen] for name, array in whole.inputs.items()}
    facts = _tell("npz", whole.samples, len(chosen), seed)
    return CalibrationSet(inputs, facts, whole.is_whole)


def _read_lines(path: Path, specs: Sequence[TensorSpec], samples: int, seed: int) -> CalibrationSet:
    try:
        with path.open("rb") as file:
            found = sum(1 for line in file if line.strip())
        chosen = choose(found, samples, seed)
        parsed = _parse_lines(path, set(chosen), {spec.name: spec for spec in specs})
    except OSError as exc:
        msg = f"{path} cannot be read: {exc}"
        raise CalibrationError(msg) from exc
    if not parsed:
        msg = f"{path} is empty"
        raise CalibrationError(msg)
    try:
        arrays = {
            spec.name: np.stack([parsed[index][spec.name] for index in chosen]) for spec in specs
        }
    except ValueError as exc:
        msg = f"{path}: the samples have different shapes: {exc}"
        raise CalibrationError(msg) from exc
    return adapt(CalibrationSet(arrays, _tell("json lines", found, len(chosen), seed)), specs)


def _parse_lines(
    path: Path, wanted: set[int], specs: Mapping[str, TensorSpec]
) -> dict[int, dict[str, Array]]:
    parsed: dict[int, dict[str, Array]] = {}
    with path.open("rb") as file:
        lines = (line for line in file if line.strip())
        for index, line in enumerate(lines):
            if index not in wanted:
                continue
            if len(line) > _MAX_LINE_BYTES:
                msg = f"{path}: sample {index + 1} has {len(line)} bytes; use an .npz"
                raise CalibrationError(msg)
            try:
                parsed[index] = _parse_sample(json.loads(line), specs)
            except (ValueError, TypeError, KeyError) as exc:
                msg = f"{path}: sample {index + 1} is no object of the model's inputs: {exc!r}"
                raise CalibrationError(msg) from exc
    return parsed


def _parse_sample(sample: Any, specs: Mapping[str, TensorSpec]) -> dict[str, Array]:
    return {
        name: np.asarray(sample[name], dtype=DTYPES[spec.datatype]) for name, spec in specs.items()
    }


@dataclass(frozen=True)
class Split:
    """Samples to calibrate with and rows to prove with."""

    calibration: CalibrationSet
    golden: CalibrationSet
    is_disjoint: bool
    """No golden row was seen by the quantizer."""


def make_golden(
    found: CalibrationSet,
    golden_rows: int = DEFAULT_GOLDEN_ROWS,
    min_samples: int = MIN_SAMPLES,
) -> Split:
    """Set golden rows apart from the samples where the user gave none.

    A quantizer does best on what it has seen, so the two are disjoint wherever that leaves at
    least `min_samples` on either side: half for calibration, at most. Where it does not, all
    samples serve as both and `is_disjoint` says so. Load `samples + golden_rows` to get both whole.

    Raises:
        CalibrationError: there is no sample at all.
    """
    if not found.samples:
        msg = "there are no samples to make a golden set of"
        raise CalibrationError(msg)
    rows = min(golden_rows, found.samples // 2)
    if rows < min_samples:
        return Split(found, found.take(slice(0, golden_rows)), is_disjoint=False)
    # The samples are in random order already.
    golden = found.take(slice(0, rows))
    return Split(found.take(slice(rows, None)), golden, is_disjoint=True)
