"""Two models side by side: the same inputs through both, their answers compared.

Owns the pairing of inputs and outputs and the order of runs: for each input A and B run in
turn, the one that begins changes each time, so that a noisy moment hits both. What "alike" means is
in `platforms.parity`.
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from console.bench.campaign import open_artifact
from console.bench.feed import Feed, has_own_preprocessing, iterate_inputs
from console.bench.target import Target
from console.errors import InputFileError
from platforms.artifact import Datatype, TensorSpec
from platforms.errors import MeasuringError, TensorError
from platforms.measuring.measurer import Measurer
from platforms.measuring.sample import Shapes, load_arrays, save_arrays
from platforms.parity import Likeness, Parity, compare_output, find_worst, judge_likeness
from platforms.runtimes.base import Array
from platforms.selection import Candidate

_REPEATS = 3
"""Runs per input; all are timed, the last one's answer counts."""
_WARM_UPS = 2

Arrays = dict[str, Array]


@dataclass(frozen=True)
class Side:
    """One of the two models."""

    target: Target
    candidate: Candidate

    @property
    def label(self) -> str:
        """Return what a person calls it."""
        file = self.candidate.artifact.file
        return file if file == self.target.name else f"{self.target.label}:{file}"


@dataclass(frozen=True)
class SideFacts:
    """What one side took."""

    label: str
    runtime: str
    size_bytes: int
    p50_ms: float
    p95_ms: float
    rss_mb: float


@dataclass(frozen=True)
class Comparison:
    """What came of it."""

    sides: tuple[SideFacts, SideFacts]
    outputs: tuple[Parity, ...]
    inputs: int
    likeness: Likeness
    notes: tuple[str, ...] = ()

    @property
    def latency_ratio(self) -> float:
        """B's median time divided by A's."""
        return self.sides[1].p50_ms / self.sides[0].p50_ms

    def find_faults(self, min_agreement: float | None, min_sqnr_db: float | None) -> list[str]:
        """Return what falls short of the given limits."""
        agreement, sqnr_db = find_worst(self.outputs)
        faults = []
        if min_agreement is not None and agreement is None:
            faults.append("there is no agreement to speak of: no output has class scores")
        elif min_agreement is not None and agreement is not None and agreement < min_agreement:
            faults.append(f"top-1 agreement {agreement:.4f} is below {min_agreement:g}")
        if min_sqnr_db is not None and sqnr_db < min_sqnr_db:
            faults.append(f"SQNR {sqnr_db:.1f} dB is below {min_sqnr_db:g}")
        return faults


class _Runner:
    """One side's child, and what it has answered."""

    def __init__(self, child: Measurer, side: Side, threads: int, folder: Path) -> None:
        self.side = side
        self._child = child
        self._inputs, self._outputs = folder / "inputs.npz", folder / "outputs.npz"
        self.loaded = open_artifact(child, side.target, side.candidate, threads)
        self.inputs = _read_specs(self.loaded["inputs"])
        self.outputs = _read_specs(self.loaded["outputs"])
        self.answers: list[Arrays] = []
        self.times_ms: list[float] = []
        self.rss_mb = 0.0

    def run(self, inputs: Mapping[str, Array], *, is_warm_up: bool = False) -> None:
        """Run one input.

        Raises:
            MeasuringError: it failed.
        """
        save_arrays(self._inputs, inputs)
        files = {"inputs": str(self._inputs), "outputs": str(self._outputs)}
        try:
            found = self._child.ask({"do": "run", **files, "repeats": _REPEATS})
        except MeasuringError as exc:
            msg = f"{self.side.label}: {exc}"
            raise MeasuringError(msg) from exc
        if not is_warm_up:
            self.answers.append(load_arrays(self._outputs))
            self.times_ms += found["times_ms"]
            self.rss_mb = found["rss_mb"]

    def summarize(self) -> SideFacts:
        """Return what this side took."""
        p50, p95 = np.percentile(self.times_ms, (50, 95))
        return SideFacts(
            label=self.side.label,
            runtime=f"{self.side.candidate.runtime} {self.loaded['version']}",
            size_bytes=self.side.candidate.artifact.size_bytes,
            p50_ms=float(p50),
            p95_ms=float(p95),
            rss_mb=self.rss_mb,
        )


def _read_specs(found: Sequence[Mapping[str, Any]]) -> tuple[TensorSpec, ...]:
    return tuple(
        TensorSpec(item["name"], Datatype(item["datatype"]), tuple(item["shape"])) for item in found
    )


def compare_models(
    sides: tuple[Side, Side],
    feed: Feed,
    threads: int,
    *,
    k: int = 5,
    shapes: Shapes | None = None,
    advance: Any = lambda _: None,
) -> Comparison:
    """Run both models on the same inputs and compare their answers.

    Args:
        sides: the reference, and what is held against it.
        feed: the inputs.
        threads: inside one operator.
        k: for top-k agreement.
        shapes: lengths of free axes, for inputs by chance.
        advance: called after each input, for a progress bar.

    Raises:
        MeasuringError: one of them does not load or run, or the answers have other shapes.
        InputFileError: an input does not fit, or the models' inputs cannot be paired.
    """
    with ExitStack() as stack:
        runners = []
        for side in sides:
            folder = Path(stack.enter_context(TemporaryDirectory(prefix="edgeward-compare-")))
            child = stack.enter_context(Measurer())
            try:
                runners.append(_Runner(child, side, threads, folder))
            except MeasuringError as exc:
                msg = f"{side.label}: {exc}"
                raise MeasuringError(msg) from exc
        first, second = runners
        for number, (left, right) in enumerate(_pair_inputs(first, second, feed, shapes)):
            if number == 0:
                for _ in range(_WARM_UPS):
                    first.run(left, is_warm_up=True)
                    second.run(right, is_warm_up=True)
            order = [(first, left), (second, right)]
            for runner, inputs in reversed(order) if number % 2 else order:
                runner.run(inputs)
            advance("comparing")
        return _conclude(first, second, k)


def _pair_inputs(first: _Runner, second: _Runner, feed: Feed, shapes: Shapes | None) -> Any:
    """Yield each input's tensors for both sides.

    Each side prepares files by its own manifest; one that has no step of its own takes the
    other's tensors, by name or by position.
    """
    a, b = first.side.target, second.side.target
    owns = [has_own_preprocessing(item.manifest) for item in (a, b)]
    if feed.items and all(owns):
        yield from zip(
            iterate_inputs(feed, a, first.inputs),
            iterate_inputs(feed, b, second.inputs),
            strict=True,
        )
        return
    giver, taker = (second, first) if owns == [False, True] else (first, second)
    names = _pair_names("inputs", giver.inputs, taker.inputs)
    if len(names) != len(taker.inputs):
        msg = f"the models take other inputs: {_list(first.inputs)} and {_list(second.inputs)}"
        raise InputFileError(msg)
    for given in iterate_inputs(feed, giver.side.target, giver.inputs, shapes):
        taken = {theirs: given[ours] for ours, theirs in names.items() if ours in given}
        yield (given, taken) if giver is first else (taken, given)


def _list(specs: Sequence[TensorSpec]) -> str:
    return ", ".join(f"{item.name} {item.datatype} {list(item.shape)}" for item in specs)


def _pair_names(
    what: str, ours: Sequence[TensorSpec], theirs: Sequence[TensorSpec]
) -> dict[str, str]:
    """Pair tensors by name; by position where no name is the same and the numbers are.

    Raises:
        InputFileError: nothing can be paired.
    """
    shared = {item.name for item in ours} & {item.name for item in theirs}
    if shared:
        return {item.name: item.name for item in ours if item.name in shared}
    if len(ours) != len(theirs):
        msg = f"the models' {what} cannot be paired: {_list(ours)} and {_list(theirs)}"
        raise InputFileError(msg)
    return {mine.name: other.name for mine, other in zip(ours, theirs, strict=True)}


def _conclude(first: _Runner, second: _Runner, k: int) -> Comparison:
    names = _pair_names("outputs", first.outputs, second.outputs)
    try:
        outputs = tuple(
            compare_output(name, *_stack(first.answers, name, second.answers, other), k)
            for name, other in names.items()
        )
    except TensorError as exc:
        raise MeasuringError(str(exc)) from exc
    alone = {item.name for item in first.outputs} - names.keys()
    alone |= {item.name for item in second.outputs} - set(names.values())
    return Comparison(
        sides=(first.summarize(), second.summarize()),
        outputs=outputs,
        inputs=len(first.answers),
        likeness=judge_likeness(outputs),
        notes=tuple(f"output {name} is on one side only" for name in sorted(alone)),
    )


def _stack(
    left: Sequence[Arrays], left_name: str, right: Sequence[Arrays], right_name: str
) -> tuple[Array, Array]:
    """Return all answers of one output on both sides; flat where their shapes vary."""
    ours, theirs = [item[left_name] for item in left], [item[right_name] for item in right]
    for number, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
        if mine.shape != other.shape:
            msg = (
                f"{left_name}: input {number} has {list(mine.shape)} on one side and "
                f"{list(other.shape)} on the other: the models do not answer the same question"
            )
            raise TensorError(msg)
    if len({array.shape[1:] for array in ours}) > 1 or not ours[0].ndim:
        ours, theirs = [item.ravel() for item in ours], [item.ravel() for item in theirs]
    return np.concatenate(ours), np.concatenate(theirs)
