"""`edgeward explain`: why a model runs as it does, and why a job is where it is."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from console.invocation import Invocation, command
from console.output import build_facts, build_table, colour_state

if TYPE_CHECKING:
    from console.explanation import Step
    from platforms.selection import Selection

app = typer.Typer(help="Say why.", no_args_is_help=True)
_TIMINGS = ("queue", "pre", "infer", "post")


def register(parent: typer.Typer) -> None:
    """Add the group to `parent`."""
    parent.add_typer(app, name="explain")


def explain_model(
    call: Invocation,
    name: Annotated[str, typer.Argument()],
    version: Annotated[
        str | None, typer.Argument(help="Number or release; else the active one.")
    ] = None,
) -> None:
    """Say which file of a model runs on this box, and what speaks against the others."""
    from agent.manifest import read_manifest
    from agent.platformfile import load_platform
    from agent.repository import ModelRepository
    from platforms.runtimes.registry import RUNTIME_FORMATS
    from platforms.selection import select_artifact

    found = ModelRepository(call.settings.models_dir).get_version(name, version)
    manifest = read_manifest(found.folder)
    with call.out.spinner("looking at this box"):
        spec = load_platform(call.settings.data_dir)
    selection = select_artifact(manifest.artifact_specs(), spec, RUNTIME_FORMATS)
    facts = {
        "model": name,
        "version": found.number,
        "release": found.release,
        "active": found.is_active,
        "box": spec.hardware_class,
        "objective": manifest.objective,
    }
    candidates = [_describe(item) for item in selection.candidates]
    call.out.show({**facts, "candidates": candidates}, lambda: _render_model(facts, selection))


def _describe(candidate: Any) -> dict[str, Any]:
    artifact = candidate.artifact
    return {
        "file": artifact.file,
        "format": artifact.format.value,
        "precision": artifact.precision.value,
        "size_bytes": artifact.size_bytes,
        "runtime": candidate.runtime,
        "verdict": candidate.verdict.value,
        "reason": candidate.reason,
    }


def _render_model(facts: dict[str, Any], selection: "Selection") -> Any:
    from rich.console import Group
    from rich.text import Text

    colours = {"chosen": "green", "compatible": "cyan", "ruled_out": "yellow"}
    rows = [
        (
            item.artifact.file,
            f"{item.artifact.format} {item.artifact.precision}",
            f"{item.artifact.size_bytes / 1e6:.2f}",
            item.runtime,
            Text(item.verdict.replace("_", " "), style=colours[item.verdict]),
            item.reason,
        )
        for item in selection.candidates
    ]
    table = build_table(("File", "Form", "MB", "Runtime", "Verdict", "Why"), rows)
    version = f"{facts['version']} (release {facts['release']})"
    state = "active" if facts["active"] else "not active"
    head = build_facts(
        [
            ("Model", f"{facts['model']}, version {version}, {state}"),
            ("Box", facts["box"]),
            ("Objective", facts["objective"]),
        ]
    )
    return Group(head, Text(), table)


def explain_job_state(
    call: Invocation, job_id: Annotated[str, typer.Argument(metavar="ID")]
) -> None:
    """Say why a job is in its state, how it came there, and what is still to be reported."""
    import json

    from agent.clock import SystemClock
    from console.boxstate import read_status
    from console.explanation import explain_job, explain_reports, list_steps
    from console.ledger_view import view_ledger

    with view_ledger(call.settings) as ledger:
        row = ledger.get_job(job_id)
        steps = list_steps(ledger.list_transitions(job_id))
        ahead = ledger.count_ahead(row) if row["state"] == "queued" else 0
        records = ledger.list_reports(job_id)
        console_acks = ledger.has_acknowledging_console()
    status, clock, mode = read_status(call.settings), SystemClock(), call.settings.outbox.ack
    by = "console" if mode == "console" or (mode == "auto" and console_acks) else "broker"
    sentences = explain_job(row, status, ahead, clock.wall_ms(), clock.boot_ms())
    sentences += explain_reports(row, records, by, status)
    timings = json.loads(row["result"]).get("timings_ms", {}) if row["result"] else {}
    document = {
        "job_id": job_id,
        "state": row["state"],
        "why": sentences,
        "steps": [asdict(step) for step in steps],
        "attempts": row["attempt"],
        "timings_ms": timings,
        "reports": {"acknowledged_by": by, "waiting": records},
    }
    call.out.show(document, lambda: _render_job(row, sentences, steps, timings))


def _render_job(
    row: dict[str, Any], sentences: list[str], steps: list["Step"], timings: dict[str, float]
) -> Any:
    from rich.console import Group
    from rich.text import Text

    head = build_facts([("Job", row["job_id"]), ("State", colour_state(row["state"]))])
    parts: list[Any] = [head, *(Text(sentence) for sentence in sentences), Text()]
    rows = [
        (step.at, f"+{step.after_ms}", colour_state(step.state), step.attempt, step.reason)
        for step in steps
    ]
    parts.append(build_table(("At", "ms", "State", "Attempt", "Reason"), rows))
    if timings:
        spent = "   ".join(f"{name} {timings[name]:g}" for name in _TIMINGS if name in timings)
        parts += [Text(), build_facts([("Timings, ms", spent)])]
    return Group(*parts)


command(app, "model")(explain_model)
command(app, "job")(explain_job_state)
