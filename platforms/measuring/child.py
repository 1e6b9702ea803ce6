"""The child process that loads one model file and does as it is told, line by line.

Owns the child's side of the pipe: a request is one JSON object on standard input, an answer
one JSON object on a private copy of standard output, since libraries print to the real one.

    {"do": "load", "runtime", "file", "threads", "declared", "target"}
                                                          → what was loaded, times, memory
    {"do": "prepare", "inputs": FILE.npz | null, "seed", "shapes"}
    {"do": "measure", "concurrency", "batch", "seconds"}  → figures, or {"skipped": why}
    {"do": "stress", "concurrency", "batch", "seconds"}   → {"progress": …}… and figures
    {"do": "run", "inputs": FILE.npz, "outputs": FILE.npz, "repeats"} → times

A runtime that is not registered is named by `target`, as `package.module:Class`.

An expected error is answered as `{"error": {"code", "message"}}`. The child ends when its
standard input does. It imports what a model needs and no more, so that its memory is the
runtime's and the model's.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

from platforms.artifact import Datatype, TensorSpec
from platforms.errors import PlatformError
from platforms.measuring.load import measure, read_memory, stress
from platforms.measuring.sample import load_arrays, make_random_inputs, repeat_rows, save_arrays
from platforms.runtimes.base import Array, Declared, LoadOptions, Session
from platforms.runtimes.registry import get_runtime, import_runtime

_STDOUT, _STDERR = 1, 2


class Child:
    """One model file, loaded once.

    Args:
        answers: where progress goes before the answer itself.
    """

    def __init__(self, answers: TextIO) -> None:
        self._answers = answers
        self._session: Session | None = None
        self._inputs: Mapping[str, Array] = {}
        self._actions: Mapping[str, Callable[..., dict[str, Any]]] = {
            "load": self._load,
            "prepare": self._prepare,
            "measure": self._measure,
            "stress": self._stress,
            "run": self._run,
        }

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """Do what a request says; expected errors become an answer."""
        action = self._actions[request.pop("do")]
        try:
            return action(**request)
        except PlatformError as exc:
            return {"error": {"code": exc.code, "message": str(exc)}}

    @property
    def _loaded(self) -> Session:
        assert self._session is not None, "the parent loads first"
        return self._session

    def _load(
        self,
        runtime: str,
        file: str,
        threads: int,
        declared: dict[str, Any] | None = None,
        target: str | None = None,
    ) -> dict[str, Any]:
        base = read_memory()
        adapter = import_runtime(runtime, target, "") if target else get_runtime(runtime)
        started = time.perf_counter()
        version = adapter.version()
        imported = time.perf_counter()
        self._session = session = adapter.load(
            Path(file), LoadOptions(threads=threads), _read_declared(declared)
        )
        return {
            "version": version,
            "provider": session.provider,
            "import_ms": 1000 * (imported - started),
            "load_ms": 1000 * (time.perf_counter() - imported),
            "inputs": [asdict(spec) for spec in session.inputs],
            "outputs": [asdict(spec) for spec in session.outputs],
            "base_rss_mb": base["rss_mb"],
            **read_memory(),
        }

    def _prepare(
        self, inputs: str | None, seed: int, shapes: dict[str, list[int]]
    ) -> dict[str, Any]:
        """Make or read the inputs, and time the first run, which pays for what is made lazily."""
        if inputs is None:
            self._inputs = make_random_inputs(self._loaded.inputs, 1, seed, shapes)
        else:
            self._inputs = load_arrays(Path(inputs))
        one = repeat_rows(self._inputs, 1) if self._is_batchable() else self._inputs
        started = time.perf_counter()
        self._loaded.run(one)
        return {"warm_up_ms": 1000 * (time.perf_counter() - started), **read_memory()}

    def _is_batchable(self) -> bool:
        return all(spec.has_free_batch for spec in self._loaded.inputs)

    def _get_batch(self, batch: int) -> Mapping[str, Array] | None:
        """Return inputs of `batch` rows, or None where the model has a batch of its own."""
        if self._is_batchable():
            return repeat_rows(self._inputs, batch)
        return self._inputs if batch == 1 else None

    def _measure(self, concurrency: int, batch: int, seconds: float) -> dict[str, Any]:
        inputs = self._get_batch(batch)
        if inputs is None:
            return {"skipped": "the model's batch is fixed"}
        return {**measure(self._loaded, inputs, concurrency, seconds), **read_memory()}

    def _stress(self, concurrency: int, batch: int, seconds: float) -> dict[str, Any]:
        inputs = self._get_batch(batch)
        if inputs is None:
            return {"skipped": "the model's batch is fixed"}

        def report(state: dict[str, Any]) -> None:
            _write(self._answers, {"progress": state})

        return stress(self._loaded, inputs, concurrency, seconds, report)

    def _run(self, inputs: str, outputs: str, repeats: int) -> dict[str, Any]:
        arrays = load_arrays(Path(inputs))
        times_ms = []
        for _ in range(repeats):
            started = time.perf_counter()
            found = self._loaded.run(arrays)
            times_ms.append(1000 * (time.perf_counter() - started))
        save_arrays(Path(outputs), found)
        return {"times_ms": times_ms, **read_memory()}


def _read_declared(given: dict[str, Any] | None) -> Declared | None:
    if given is None:
        return None
    return Declared(
        *(
            tuple(
                TensorSpec(item["name"], Datatype(item["datatype"]), tuple(item["shape"]))
                for item in given[side]
            )
            for side in ("inputs", "outputs")
        )
    )


def _write(answers: TextIO, answer: Mapping[str, Any]) -> None:
    answers.write(json.dumps(answer) + "\n")
    answers.flush()


def serve(make: Callable[[TextIO], Callable[[dict[str, Any]], dict[str, Any]]]) -> int:
    """Answer requests until standard input ends.

    Args:
        make: is given where progress goes, and returns what answers one request.
    """
    with os.fdopen(os.dup(_STDOUT), "w", encoding="utf-8") as answers:
        os.dup2(_STDERR, _STDOUT)
        answer = make(answers)
        for line in sys.stdin:
            _write(answers, answer(json.loads(line)))
    return 0


def main() -> int:
    """Load and measure as told."""
    return serve(lambda answers: Child(answers).answer)


if __name__ == "__main__":
    sys.exit(main())
