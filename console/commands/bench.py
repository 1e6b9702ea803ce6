"""`edgeward bench`: how fast a model is on this box."""

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from console.bench.options import (
    AgainstOption,
    ArtifactOption,
    BatchOption,
    ConcurrencyOption,
    ForceOption,
    ModelArgument,
    PlotOption,
    ReportOption,
    RoundsOption,
    RuntimeOption,
    SaveBaselineOption,
    SecondsOption,
    ShapeOption,
    StressOption,
    ThreadsOption,
    VersionOption,
    parse_numbers,
    parse_shapes,
)
from console.exits import Exit
from console.invocation import Invocation, command, end_with

if TYPE_CHECKING:
    from rich.progress import Progress

    from console.bench.baseline import Judgement
    from console.bench.campaign import Plan
    from console.bench.report import Report
    from console.bench.target import Target
    from platforms.spec import PlatformSpec

_SAMPLE_ROWS = 16
"""Different input rows of a measurement; larger batches repeat them."""
_CONFIRMATIONS = 2
"""Times that what looks slower than a baseline is measured again before it is told."""


def register(parent: typer.Typer) -> None:
    """Add the command to `parent`."""
    command(parent, "bench")(bench_model)


def bench_model(
    call: Invocation,
    model: ModelArgument,
    version: VersionOption = None,
    artifact: ArtifactOption = None,
    runtime: RuntimeOption = None,
    concurrency: ConcurrencyOption = "1,2,4,8",
    batch: BatchOption = "1,4,16",
    seconds: SecondsOption = 3.0,
    rounds: RoundsOption = 3,
    threads: ThreadsOption = None,
    shape: ShapeOption = None,
    stress: StressOption = None,
    report: ReportOption = None,
    plot: PlotOption = None,
    save_baseline: SaveBaselineOption = None,
    against: AgainstOption = None,
    force: ForceOption = False,
) -> None:
    """Measure how fast a model runs here: every artifact, every runtime, under load.

    Each one runs in a fresh process of its own, in rounds. Stop the worker first: what
    else runs on the box is in the figures.
    """
    from console.bench.report import read_report
    from console.bench.target import find_target, look_at_box

    _check_options(stress=stress, plot=plot, against=against)
    before = None if against is None else read_report(against)
    target = find_target(call.settings, model, version)
    with call.out.spinner("looking at this box"):
        spec = look_at_box(call.settings)
    loads = (concurrency, batch)
    wish = _Wish(loads, seconds, rounds, threads, parse_shapes(shape), stress)

    def measure(artifacts: list[str], runtimes: list[str]) -> "Report":
        return _measure(call, target, spec, (artifacts, runtimes), wish)

    found = measure(artifact or [], runtime or [])
    judgement = None
    if before is not None:
        judgement = _confirm(call, before, _judge(call, before, found, force=force), measure)
    _show_report(call, found, judgement)
    _write_files(call, found, report, plot, save_baseline)
    is_good = bool(found.measured) and not found.failed
    end_with(Exit.OK if is_good and not (judgement and judgement.is_worse) else Exit.ERROR)


class _Wish:
    """What the options say about the load."""

    def __init__(
        self,
        loads: tuple[str, str],
        seconds: float,
        rounds: int,
        threads: int | None,
        shapes: dict[str, tuple[int, ...]],
        stress_s: float | None,
    ) -> None:
        self.concurrency, self.batch = (parse_numbers(text) for text in loads)
        self.seconds = seconds
        self.rounds = rounds
        self.threads = threads
        self.shapes = shapes
        self.stress_s = stress_s

    def make_plan(self, spec: "PlatformSpec", inputs: Path | None) -> "Plan":
        """Return what is asked of each configuration."""
        from console.bench.campaign import Plan, plan_loads
        from platforms.measuring.sample import SEED
        from platforms.threads import compute_threads

        loads = plan_loads(self.concurrency, self.batch)
        if self.stress_s is not None:
            loads = ((max(self.concurrency), 1),)
        return Plan(
            loads=loads,
            seconds=self.stress_s or self.seconds,
            rounds=1 if self.stress_s is not None else self.rounds,
            threads=self.threads or compute_threads(spec.cores, 1),
            inputs=inputs,
            seed=SEED,
            shapes=self.shapes,
            stress_s=self.stress_s or 0.0,
        )


def _check_options(*, stress: float | None, plot: Path | None, against: Path | None) -> None:
    """Refuse what could not be done at the end, before the work."""
    from console.bench.chart import check_format

    if stress is not None and (plot or against):
        raise typer.BadParameter("a stress run has no points to draw or to compare")
    if plot is not None:
        check_format(plot)


def _measure(
    call: Invocation,
    target: "Target",
    spec: "PlatformSpec",
    filters: tuple[list[str], list[str]],
    wish: _Wish,
) -> "Report":
    import tempfile

    from console.bench.campaign import Campaign
    from console.bench.target import list_candidates
    from platforms.selection import Verdict

    candidates = list_candidates(target, spec, *filters)
    if wish.stress_s is not None and not any(filters):
        # A long run is meant for what the worker runs.
        candidates = [item for item in candidates if item.verdict is Verdict.CHOSEN] or candidates
    with tempfile.TemporaryDirectory(prefix="edgeward-bench-") as folder:
        inputs, source = _prepare_inputs(target, Path(folder))
        plan = wish.make_plan(spec, inputs)
        running = sum(item.verdict is not Verdict.RULED_OUT for item in candidates)
        with call.out.progress("steps") as progress:
            advance = make_advance(progress, running * plan.steps)
            found = Campaign(target, candidates, plan, advance).run()
    return _build_report(target, spec, plan, wish, source, found)


def make_advance(progress: "Progress | None", total: int) -> Any:
    """Return what moves the bar: it is called before each step."""
    if progress is None:
        return lambda _: None
    task = progress.add_task("starting", total=total)
    state = {"begun": False}

    def advance(description: str) -> None:
        progress.update(task, description=description, advance=1 if state["begun"] else 0)
        state["begun"] = True

    return advance


def _prepare_inputs(target: "Target", folder: Path) -> tuple[Path | None, str]:
    """Write rows of real or made-up inputs to a file; None where random tensors have to do."""
    from console.bench.feed import choose_feed, iterate_inputs, stack_inputs
    from platforms.measuring.sample import save_arrays

    feed = choose_feed([target], None, _SAMPLE_ROWS)
    if not feed.items:
        return None, "random tensors"
    path = folder / "inputs.npz"
    save_arrays(path, stack_inputs([*iterate_inputs(feed, target, ())]))
    return path, feed.description


def _build_report(
    target: "Target",
    spec: "PlatformSpec",
    plan: "Plan",
    wish: _Wish,
    source: str,
    configurations: Any,
) -> "Report":
    import importlib.metadata

    from console.bench.report import Box, Conditions, Model, Report

    return Report(
        schema="edgeward.bench/v1",
        measured_at=datetime.now(UTC).isoformat(timespec="seconds"),
        edgeward=importlib.metadata.version("edgeward"),
        box=Box(
            hardware_class=spec.hardware_class,
            os=f"{spec.os.value} {spec.os_version}",
            arch=spec.arch.value,
            cpu_model=spec.cpu_model,
            cores=spec.cores,
            memory_mb=spec.memory_mb,
            python=spec.python_version,
        ),
        model=Model(
            name=target.name, version=target.version, release=target.release, digest=target.digest
        ),
        conditions=Conditions(
            seconds=plan.seconds,
            rounds=plan.rounds,
            threads=plan.threads,
            concurrency=wish.concurrency,
            batch=wish.batch,
            inputs=source,
        ),
        configurations=configurations,
    )


def _judge(call: Invocation, before: "Report", now: "Report", *, force: bool) -> "Judgement":
    """Compare with a baseline.

    Raises:
        BaselineMismatchError: it is of something else, and nobody insists.
    """
    from console.bench.baseline import find_mismatches, judge
    from console.errors import BaselineMismatchError

    mismatches = find_mismatches(before, now)
    if mismatches and not force:
        found = "; ".join(mismatches)
        msg = f"the baseline is of something else (--force compares all the same): {found}"
        raise BaselineMismatchError(msg)
    for text in mismatches:
        call.out.note(f"differs: {text}")
    return judge(before, now)


def _confirm(
    call: Invocation,
    before: "Report",
    judgement: "Judgement",
    measure: Callable[[list[str], list[str]], "Report"],
) -> "Judgement":
    """Measure again what looks slower; return what is slower every time."""
    from console.bench.baseline import confirm, judge

    for _ in range(_CONFIRMATIONS):
        suspects = judgement.regressions
        if not suspects:
            break
        call.out.note(f"{len(suspects)} figures look worse than the baseline: measuring again")
        artifacts = list(dict.fromkeys(change.artifact for change in suspects))
        runtimes = list(dict.fromkeys(change.runtime for change in suspects))
        again = measure(artifacts, runtimes)
        judgement = confirm(judgement, judge(_keep(before, artifacts, runtimes), again))
    return judgement


def _keep(report: "Report", artifacts: list[str], runtimes: list[str]) -> "Report":
    """Return a report with some of its configurations only."""
    kept = tuple(
        item
        for item in report.configurations
        if item.artifact in artifacts and item.runtime in runtimes
    )
    return report.model_copy(update={"configurations": kept})


def _show_report(call: Invocation, found: "Report", judgement: "Judgement | None") -> None:
    document = found.model_dump(mode="json", by_alias=True)
    if judgement is not None:
        document["against"] = judgement.to_json()
    call.out.show(document, lambda: _render(found, judgement))


def _render(found: "Report", judgement: "Judgement | None") -> Any:
    from console.bench.screen import render_report

    return render_report(found, judgement)


def _write_files(
    call: Invocation,
    found: "Report",
    folder: Path | None,
    plot: Path | None,
    baseline: Path | None,
) -> None:
    from console.bench.chart import draw_report, is_available
    from console.bench.report import render_markdown

    has_points = any(item.points for item in found.measured)
    pictures = []
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "bench.json").write_text(found.to_text(), encoding="utf-8")
        if has_points and is_available():
            draw_report(found, folder / "bench.svg")
            pictures = ["bench.svg"]
        text = render_markdown(found, pictures)
        (folder / "bench.md").write_text(text, encoding="utf-8")
        call.out.note(f"report: {folder / 'bench.md'}")
    if plot is not None and has_points:
        plot.parent.mkdir(parents=True, exist_ok=True)
        draw_report(found, plot)
        call.out.note(f"plot: {plot}")
    if baseline is not None:
        baseline.parent.mkdir(parents=True, exist_ok=True)
        baseline.write_text(found.to_text(), encoding="utf-8")
        call.out.note(f"baseline: {baseline}")
