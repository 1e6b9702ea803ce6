"""What the engine costs beside the bare runtime, for batch work and for single requests.

    python -m benchmarks.engine [--seconds 6] [--json]

For each net, on one session of one thread and in one process: the cost curve; rows/s of batch
work through the engine's instances and stacking, cut to the chosen batch, beside rows/s of a loop
over the same session at the best measured batch: `engine` has its 64 rows in one request,
`bundle` in 64 requests that are stacked and taken apart; and requests/s of the
service, inline and through the batcher's threads, beside rows/s of the session at 1 row. The
ways take turns of a twentieth of a second, so that a noisy machine hits them alike; the ratio is
the median over the rounds.
"""

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from agent.repository import ModelRepository
from benchmarks.nets import write_cnn_version, write_mlp_version
from platforms.runtimes.base import Array
from platforms.runtimes.proof import prove_runtime
from platforms.spec import Arch, Os, PlatformSpec
from worker.engine.batcher import run_stacked
from worker.engine.costs import CostPolicy, Objective, make_inputs
from worker.engine.engine import Engine, ServedModel
from worker.engine.service import TensorRequest
from worker.engine.serving import EngineService
from worker.engine.sessions import LoadedModel

_TURN_S = 0.05
_BUNDLE = 64
_CLIENTS = 32

Way = Callable[[], int]
"""Works for a little while and returns the rows it has done."""


def build_spec() -> PlatformSpec:
    """Return a box of one core: one instance of one thread, as the loop beside it has."""
    return PlatformSpec(
        os=Os.LINUX,
        os_version="",
        arch=Arch.X86_64,
        cpu_model="",
        cpu_flags=(),
        cores=1.0,
        cores_machine=1,
        memory_mb=4000,
        memory_machine_mb=4000,
        python_version="",
        runtimes=(prove_runtime("ort"),),
    )


def run_turns(ways: Mapping[str, Way], seconds: float) -> dict[str, list[float]]:
    """Let the ways take turns; return each one's rows per second, by round."""
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for way in ways.values():
        way()
    deadline = time.perf_counter() + seconds
    while time.perf_counter() < deadline or len(rates[next(iter(ways))]) < 3:
        for name, way in ways.items():
            began = time.perf_counter()
            rows = 0
            while time.perf_counter() - began < _TURN_S:
                rows += way()
            rates[name].append(rows / (time.perf_counter() - began))
    return rates


def build_batch_ways(model: LoadedModel, served: ServedModel) -> dict[str, Way]:
    """Return batch work through the engine, and the same session in a bare loop."""
    assert served.costs is not None
    best = min(served.costs.points, key=lambda point: point.per_row_ms).rows
    whole = make_inputs(model.session, best)
    one, wide = make_inputs(model.session), make_inputs(model.session, _BUNDLE)
    batcher = served.batcher
    chosen = batcher.max_rows

    def loop() -> int:
        model.session.run(whole, check_finite=False)
        return best

    def run(parts: Sequence[Mapping[str, Array]], rows: int) -> None:
        if not batcher.try_acquire():
            batcher.wait()
        try:
            run_stacked(model.session, parts, [rows] * len(parts), chosen)
        finally:
            batcher.release()

    def engine() -> int:
        run([wide], _BUNDLE)
        return _BUNDLE

    def bundle() -> int:
        for start in range(0, _BUNDLE, chosen):
            run([one] * min(chosen, _BUNDLE - start), 1)
        return _BUNDLE

    return {"loop": loop, "engine": engine, "bundle": bundle}


def build_request_ways(
    service: EngineService, model: LoadedModel, served: ServedModel, loop: asyncio.AbstractEventLoop
) -> dict[str, Way]:
    """Return single requests: to the bare session, inline, from one client and from many."""
    one = make_inputs(model.session)
    request = TensorRequest(served.key.name, one)

    def bare() -> int:
        model.session.run(one, check_finite=False)
        return 1

    def client() -> int:
        loop.run_until_complete(service.infer(request))
        return 1

    async def ask_often() -> None:
        for _ in range(4):
            await service.infer(request)

    async def ask_all() -> None:
        await asyncio.gather(*(ask_often() for _ in range(_CLIENTS)))

    def clients() -> int:
        loop.run_until_complete(ask_all())
        return 4 * _CLIENTS

    ways: dict[str, Way] = {"bare": bare, "client": client, "clients": clients}
    if service.infer_inline(request) is not None:
        ways["inline"] = lambda: 1 if service.infer_inline(request) else 0
    return ways


def compute_ratios(rates: Mapping[str, Sequence[float]], base: str) -> dict[str, Any]:
    """Return rows/s of each way, and its ratio to `base`: the median over rounds, and its range."""
    figures: dict[str, Any] = {}
    for name, mine in rates.items():
        ratios = [own / other for own, other in zip(mine, rates[base], strict=True)]
        figures[name] = {
            "rows_per_s": round(statistics.median(mine), 1),
            "of_base": round(statistics.median(ratios), 3),
            "range": [round(min(ratios), 3), round(max(ratios), 3)],
        }
    return figures


def measure(name: str, folder: Path, seconds: float) -> dict[str, Any]:
    """Measure one net, given its version folder."""
    repository = ModelRepository(folder.parent / f"models-{name}")
    repository.add(folder)
    engine = Engine(build_spec(), costs=CostPolicy(Objective.THROUGHPUT))
    service = EngineService(engine, repository)
    loop = asyncio.new_event_loop()
    loop.run_until_complete(service.load(name))
    (model,) = engine.cache.get_models()
    (served,) = engine.list_served()
    assert served.costs is not None
    batch = run_turns(build_batch_ways(model, served), seconds / 2)
    single = run_turns(build_request_ways(service, model, served, loop), seconds / 2)
    service.close()
    loop.close()
    return {
        "costs": served.costs.to_json(),
        "batch_work": compute_ratios(batch, "loop"),
        "requests": compute_ratios(single, "bare"),
    }


def main() -> int:
    """Measure both nets and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--seconds", type=float, default=6.0, help="for each net")
    parser.add_argument("--side", type=int, default=160, help="of the CNN's picture")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as text:
        root = Path(text)
        write_mlp_version(root / "mlp")
        write_cnn_version(root / "cnn", side=options.side)
        figures = {one: measure(one, root / one, options.seconds) for one in ("mlp", "cnn")}
    if options.json:
        print(json.dumps(figures, indent=1))
        return 0
    for name, one in figures.items():
        print(f"{name}: {one['costs']['reason']}")
        print("  " + "  ".join(f"{rows}: {ms:.3f} ms" for rows, ms in one["costs"]["points"]))
        for kind in ("batch_work", "requests"):
            for way, figure in one[kind].items():
                low, high = figure["range"]
                rate = f"{figure['rows_per_s']:>10.1f} rows/s"
                print(f"  {kind:>10} {way:>8} {rate}  ×{figure['of_base']:.3f} ({low}–{high})")
    return 0


if __name__ == "__main__":
    np.seterr(all="ignore")
    sys.exit(main())
