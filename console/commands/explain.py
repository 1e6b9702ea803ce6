"""`edgeward explain`: why a model runs as it does, and why a job is where it is."""

from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from console.invocation import Invocation, command
from console.output import build_facts, build_table, colour_state

if TYPE_CHECKING:
    from agent.manifest import Manifest
    from console.explanation import Step
    from platforms.selection import Selection
    from platforms.spec import PlatformSpec
    from worker.engine.costs import KeptCurve

app = typer.Typer(help="Say why.", no_args_is_help=True)
_NOT_MEASURED = "not measured yet: the first load on a box with the HTTP API on does that"
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
    load: Annotated[
        bool, typer.Option("--load", help="Load it, to see what its runtime says of it.")
    ] = False,
    plot: Annotated[
        Path | None, typer.Option(help="Draw what batches cost, as .svg, .png or .pdf.")
    ] = None,
) -> None:
    """Say which file of a model runs on this box, why not the others, and what batches cost."""
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
    chosen = selection.chosen
    kept = None if chosen is None else _find_costs(call, chosen.artifact, manifest)
    loaded = _load(call, found.folder, spec) if load else None
    document = {
        **facts,
        "candidates": candidates,
        "serving": _describe_serving(found.folder, manifest),
        "batching": _describe_costs(kept),
        "loaded": loaded,
    }
    call.out.show(document, lambda: _render_model(document, selection, kept))
    if plot is not None:
        _draw(call, f"{name}, version {found.number}", kept, plot)


def _find_costs(call: Invocation, artifact: Any, manifest: "Manifest") -> "KeptCurve | None":
    from worker.engine.costs import find_curves, get_objective

    objective = get_objective(manifest.objective)
    kept = find_curves(call.settings.costs_dir, artifact.sha256, objective)
    return kept[0] if kept else None


def _describe_costs(kept: "KeptCurve | None") -> dict[str, Any] | None:
    if kept is None:
        return None
    measured_at = datetime.fromtimestamp(kept.measured_s, UTC).isoformat(timespec="seconds")
    return {**kept.curve.to_json(), "measured_at": measured_at, "file": str(kept.path)}


def _describe_serving(folder: Path, manifest: "Manifest") -> dict[str, Any]:
    """Return what the model's configuration asks for; None stands for Edgeward's own choice."""
    from worker.engine.modelconfig.source import build_serving, find_config
    from worker.errors import ModelConfigError

    try:
        serving = build_serving(find_config(folder, manifest), manifest)
    except ModelConfigError as exc:
        return {"error": exc.code, "message": str(exc)}
    return {
        "max_rows": serving.max_rows,
        "is_batching": serving.is_batching,
        "preferred_rows": list(serving.preferred_rows),
        "max_queue_delay_s": serving.max_queue_delay_s,
        "instances": serving.instances,
        "queue_requests": serving.queue.max_queue_size or None,
        "timeout_s": serving.queue.timeout_s or None,
        "response_cache": serving.response_cache,
        "warmup": [sample.name for sample in serving.warmup],
    }


def _load(call: Invocation, folder: Path, spec: "PlatformSpec") -> dict[str, Any]:
    from worker.engine.sessions import load_model
    from worker.engine.threads import compute_threads

    with call.out.spinner("loading the model"):
        model = load_model(folder, spec, compute_threads(spec.cores, 1))
    found = {
        "runtime": model.runtime,
        "provider": model.provider,
        "load_ms": round(model.load_ms, 1),
        "is_batchable": model.is_batchable,
        "findings": list(model.session.findings),
    }
    model.session.close()
    return found


def _draw(call: Invocation, title: str, kept: "KeptCurve | None", path: Path) -> None:
    from console.bench.chart import draw_costs

    if kept is None:
        call.out.note(f"no plot: {_NOT_MEASURED}")
        return
    points = [(point.rows, point.latency_ms) for point in kept.curve.points]
    draw_costs(title, points, kept.curve.chosen_rows, path)
    call.out.note(f"plot: {path}")


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


def _render_model(facts: dict[str, Any], selection: "Selection", kept: "KeptCurve | None") -> Any:
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
    parts = [head, Text(), table, Text(), *_render_costs(facts["batching"], kept)]
    asked = {key: value for key, value in facts["serving"].items() if value not in (None, [], 0)}
    parts += [Text(), build_facts([("Configured", _word(asked))])]
    if facts["loaded"] is not None:
        parts.append(build_facts([("Loaded", _word(facts["loaded"]))]))
    return Group(*parts)


def _render_costs(batching: dict[str, Any] | None, kept: "KeptCurve | None") -> list[Any]:
    if batching is None or kept is None:
        return [build_facts([("Batches", _NOT_MEASURED)])]
    rows = [
        (
            point.rows,
            f"{point.latency_ms:.3f}",
            f"{point.per_row_ms:.4f}",
            f"{1000 / point.per_row_ms:,.0f}",
            "largest batch made" if point.rows == kept.curve.chosen_rows else "",
        )
        for point in kept.curve.points
    ]
    table = build_table(("Rows", "ms", "ms a row", "Rows/s", ""), rows)
    return [build_facts([("Batches", batching["reason"])]), table]


def _word(values: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in values.items()) or "nothing"


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
