"""`./run chaos`: breaks a box at random and shows what the history checker says.

Exit code 0 where nothing was lost, doubled or illegal, 1 otherwise.
"""

import argparse
import contextlib
import random
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from console.output import Output, build_facts, build_table
from tests.fault.chaos.cast import RESTART_S
from tests.fault.chaos.checker import DOUBLE, ILLEGAL, LOST, describe_job
from tests.fault.chaos.plan import WIRE_LINKS, Fault, Kind, Plan, make_plan
from tests.fault.chaos.proxy import Link
from tests.fault.chaos.scenario import JOURNAL, LEDGER, Outcome, Scenario, find_percentile
from tests.fault.chaos.wire import Wire, find_obstacle

USAGE_ERROR = 2
_SHOWN_FINDINGS = 20
_TOLD_HISTORIES = 5


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    names = [item.value for kinds in (Kind, Fault, Link) for item in kinds]
    parser = argparse.ArgumentParser(prog="./run chaos", description=__doc__)
    parser.add_argument("--jobs", type=int, default=1000, help="jobs to submit (1,000)")
    parser.add_argument("--kills", type=int, default=40, help="processes to kill (40)")
    parser.add_argument("--seed", type=int, default=None, help="decides the plan (random)")
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    parser.add_argument(
        "--without", action="append", default=[], choices=names, help="leave this out", metavar="X"
    )
    parser.add_argument("--offline-s", type=float, default=0.0, help="length of the long cut")
    parser.add_argument("--duplicate", type=float, default=0.03, help="share of doubled packets")
    parser.add_argument("--restart-s", type=float, default=RESTART_S, help="time down after an end")
    parser.add_argument("--quiet-s", type=float, default=30.0, help="longest silence at the end")
    parser.add_argument(
        "--wire", action="store_true", help="lose IP packets too: the agent in a netns (root)"
    )
    parser.add_argument(
        "--store",
        choices=("changes", "interval"),
        default="interval",
        help="when Mosquitto writes its store: every 5 s as shipped, or at each change",
    )
    parser.add_argument("--folder", type=Path, help="keep everything there")
    return parser.parse_args(argv)


@contextlib.contextmanager
def open_folder(wanted: Path | None) -> Iterator[Path]:
    """Give a folder for the run; a temporary one goes away, unless something was found."""
    if wanted is not None:
        yield wanted
        return
    folder = Path(tempfile.mkdtemp(prefix="edgeward-chaos-"))
    try:
        yield folder
    finally:
        if not (folder / "keep").exists():
            shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def open_wire(*, wanted: bool) -> Iterator[Wire | None]:
    """Give the agent a network of its own for the run, where that is wanted."""
    if not wanted:
        yield None
        return
    wire = Wire()
    try:
        yield wire
    finally:
        wire.close()


def summarise(outcome: Outcome, folder: Path) -> dict[str, Any]:
    """Return the run's JSON document."""
    report, recoveries = outcome.report, outcome.list_recoveries()
    findings = [
        {"class": item.kind, "rule": item.rule, "job": item.job, "detail": item.detail}
        for item in report.findings
    ]
    for item in findings[:_TOLD_HISTORIES]:
        if item["job"] is not None:
            item["history"] = describe_job(folder / JOURNAL, folder / LEDGER, item["job"])
    by_member: dict[str, Any] = {}
    for member, kills in sorted(outcome.kills.items()):
        own = [
            took
            for probe, took in zip(outcome.probes, recoveries, strict=True)
            if probe.member == member
        ]
        by_member[member] = {"kills": kills, "recovery_p95_s": round(find_percentile(own, 0.95), 2)}
    return {
        "jobs": outcome.plan.jobs,
        "kills": sum(outcome.kills.values()),
        "lost": report.count(LOST),
        "double": report.count(DOUBLE),
        "illegal": report.count(ILLEGAL),
        "recovery_p95_s": round(find_percentile(recoveries, 0.95), 2),
        "recovery_p50_s": round(find_percentile(recoveries, 0.5), 2),
        "recovery_max_s": round(max(recoveries, default=0.0), 2),
        "recovery_raw_p95_s": round(find_percentile(outcome.list_recoveries(raw=True), 0.95), 2),
        "seed": outcome.plan.seed,
        "duration_s": round(outcome.duration_s, 1),
        "became_quiet": outcome.is_quiet,
        "members": by_member,
        "faults": dict(sorted(outcome.faults.items())),
        "ledger_jobs": report.jobs,
        "ends": report.ends,
        "counts": outcome.counts,
        "notes": report.notes,
        "findings": findings,
    }


def render(document: dict[str, Any]) -> Any:
    """Return what a person sees at the end."""
    from rich.console import Group, RenderableType

    names = ("jobs", "kills", "lost", "double", "illegal", "recovery_p50_s", "recovery_p95_s")
    facts = [(name, document[name]) for name in (*names, "seed", "duration_s", "became_quiet")]
    members = build_table(
        ("Killed", "Times", "Recovery p95 s"),
        [
            (name, item["kills"], item["recovery_p95_s"])
            for name, item in document["members"].items()
        ],
    )
    sums = [(name, _join(document[name])) for name in ("ends", "faults")]
    parts: list[RenderableType] = [build_facts(facts), "", members, "", build_facts(sums)]
    parts += [f"note: {note}" for note in document["notes"]]
    if document["findings"]:
        rows = [
            (item["class"], item["rule"], item["job"], item["detail"])
            for item in document["findings"][:_SHOWN_FINDINGS]
        ]
        parts += ["", build_table(("Class", "Rule", "Job", "Detail"), rows)]
    return Group(*parts)


def _join(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.items())


@contextlib.contextmanager
def show_progress(output: Output, plan: Plan) -> Iterator[Callable[[int, int, int, str], None]]:
    """Show how far a run is, where a person watches."""
    with output.progress("jobs ended") as bar:
        if bar is None:
            yield lambda *_: None
            return
        task = bar.add_task("starting", total=plan.jobs)

        def tell(ended: int, jobs: int, kills: int, doing: str) -> None:
            text = f"{kills}/{plan.kills} kills · {doing:<20.20}"
            bar.update(task, completed=ended, total=max(jobs, ended), description=text)

        yield tell


def main(argv: Sequence[str] | None = None) -> int:
    """Run once; 0 where nothing was found."""
    arguments = parse_arguments(argv)
    seed = random.SystemRandom().randrange(2**31) if arguments.seed is None else arguments.seed
    plan = make_plan(
        arguments.jobs,
        arguments.kills,
        seed,
        without=(*arguments.without, *(() if arguments.wire else WIRE_LINKS)),
        offline_s=arguments.offline_s,
    )
    store = arguments.store
    options = {"restart_s": arguments.restart_s, "durable": store == "changes"}
    output = Output(as_json=arguments.json)
    if arguments.wire and (obstacle := find_obstacle()):
        output.fail("no_wire", obstacle)
        return USAGE_ERROR
    with open_folder(arguments.folder) as folder, open_wire(wanted=arguments.wire) as wire:
        with show_progress(output, plan) as tell:
            outcome = Scenario(
                folder,
                plan,
                duplicate=arguments.duplicate,
                quiet_limit_s=arguments.quiet_s,
                on_progress=tell,
                cast_options={**options, "wire": wire},
            ).run()
        document = {**summarise(outcome, folder), "mqtt_store": store}
        if not outcome.is_clean:
            (folder / "keep").touch()
            document["folder"] = str(folder)
            output.note(f"kept: {folder}")
    output.show(document, lambda: render(document))
    return 0 if outcome.is_clean else 1


if __name__ == "__main__":
    sys.exit(main())
