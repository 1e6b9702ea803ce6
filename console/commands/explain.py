"""`edgeward explain`: why a model runs as it does, and why a job is where it is."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from console.exits import Exit
from console.invocation import Invocation, command, end_with
from console.output import build_facts, build_table, colour_state

if TYPE_CHECKING:
    from agent.choice import ChoiceRecord
    from agent.config import Settings
    from agent.repository import ModelVersion
    from console.explanation import Step
    from console.model_explanation import Costs, Setting
    from platforms.selection import Candidate, Selection
    from platforms.spec import PlatformSpec

app = typer.Typer(help="Say why.", no_args_is_help=True)
_ALWAYS_SHOWN = ("instances", "is_batching", "max_rows", "max_queue_delay_s", "queue")
"""Settings that are worth a line where nobody has set them."""
_TIMINGS = ("queue", "pre", "infer", "post")


def register(parent: typer.Typer) -> None:
    """Add the group to `parent`."""
    parent.add_typer(app, name="explain")


def explain_model(
    call: Invocation,
    name: Annotated[str, typer.Argument(metavar="NAME[:VERSION]", help="The model's name.")],
    version: Annotated[
        str | None, typer.Argument(help="Number or release; else the active one.")
    ] = None,
    load: Annotated[
        bool,
        typer.Option(
            "--load", help="Load it here as well, to see what its runtime says of itself."
        ),
    ] = False,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Draw what batches of it cost: .svg, .png or .pdf."),
    ] = None,
) -> None:
    """Say which file of a model runs here, what speaks against the others, what batches cost.

    Costs and settings are read from the box's files, without loading the model and without
    asking a worker. What only a load tells (the provider that really runs it, findings such as a
    fall-back to the CPU) needs --load: seconds, and the model's memory.
    """
    from agent.manifest import read_manifest
    from agent.platformfile import load_platform
    from agent.repository import ModelRepository
    from console.bench.chart import check_format
    from console.model_explanation import describe_load, find_costs
    from console.staging_view import find_box_preference, find_record
    from platforms.runtimes.registry import RUNTIME_FORMATS
    from platforms.selection import select_artifact

    if plot is not None:
        check_format(plot)
    name, version = _split_version(name, version)
    found = ModelRepository(call.settings.models_dir).get_version(name, version)
    manifest = read_manifest(found.folder)
    with call.out.spinner("looking at this box"):
        spec = load_platform(call.settings.data_dir)
    preference = find_box_preference(call.settings, spec, found.folder)
    selection = select_artifact(manifest.artifact_specs(), spec, RUNTIME_FORMATS, preference)
    loaded = None
    if load:
        with call.out.spinner("loading the model"):
            loaded = describe_load(call.settings, spec, found.folder)
    view = _View(
        found=found,
        box=spec.hardware_class,
        objective=manifest.objective,
        selection=selection,
        costs=find_costs(call.settings, spec, selection.chosen, manifest, loaded),
        loaded=loaded,
        record=find_record(call.settings, found.folder),
    )
    view.add_settings(call.settings, spec, manifest)
    call.out.show(view.to_json(), lambda: _render_model(view))
    if plot is not None:
        _draw(call, view, plot)


def _split_version(name: str, version: str | None) -> tuple[str, str | None]:
    """Take `digits:2` apart.

    Raises:
        typer.BadParameter: there are two versions.
    """
    bare, colon, inside = name.partition(":")
    if colon and (version is not None or not inside):
        raise typer.BadParameter(f"{name!r} and {version!r}: name one version")
    return bare, inside or version


@dataclass
class _View:
    """What is shown of a model version."""

    found: "ModelVersion"
    box: str
    objective: str
    selection: "Selection"
    costs: "Costs"
    loaded: dict[str, Any] | None
    record: "ChoiceRecord | None" = None
    """Of its staging."""
    settings: list["Setting"] = field(default_factory=list)
    problem: tuple[str, str] | None = None
    """Code and message of what is wrong with its configuration."""

    def add_settings(self, settings: "Settings", spec: "PlatformSpec", manifest: Any) -> None:
        """Find out how requests wait; what is wrong with the files is part of the answer."""
        from console.model_explanation import list_settings
        from worker.errors import ModelConfigError

        is_batchable = self.loaded["is_batchable"] if self.loaded is not None else None
        try:
            self.settings = list_settings(
                settings, spec, self.found.folder, manifest, self.costs.kept, is_batchable
            )
        except ModelConfigError as exc:
            self.problem = (exc.code, str(exc))

    def to_json(self) -> dict[str, Any]:
        """Return the document."""
        serving: dict[str, Any] = {one.name: one.value for one in self.settings}
        if self.problem is not None:
            serving = {"error": self.problem[0], "message": self.problem[1]}
        return {
            "model": self.found.name,
            "version": self.found.number,
            "release": self.found.release,
            "active": self.found.is_active,
            "box": self.box,
            "objective": self.objective,
            "candidates": [_describe(item) for item in self.selection.candidates],
            "staging": None if self.record is None else self.record.to_json(),
            "batching": self.costs.to_json(),
            "batching_note": self.costs.note,
            "serving": serving,
            "serving_from": {one.name: one.origin for one in self.settings},
            "loaded": self.loaded,
        }


def _draw(call: Invocation, view: _View, path: Path) -> None:
    from console.bench.chart import draw_costs

    kept = view.costs.kept
    if kept is None:
        call.out.note(f"no plot: {view.costs.note}")
        end_with(Exit.ERROR)
        return
    points = [(point.rows, point.latency_ms) for point in kept.curve.points]
    title = f"{view.found.name}, version {view.found.number}"
    path.parent.mkdir(parents=True, exist_ok=True)
    draw_costs(title, kept.curve.reason, points, kept.curve.chosen_rows, path)
    call.out.note(f"plot: {path}")


def _describe(candidate: "Candidate") -> dict[str, Any]:
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


def _render_model(view: _View) -> Any:
    from rich.console import Group
    from rich.text import Text

    found = view.found
    version = f"{found.number} (release {found.release})"
    state = "active" if found.is_active else "not active"
    head = build_facts(
        [
            ("Model", f"{found.name}, version {version}, {state}"),
            ("Box", view.box),
            ("Objective", view.objective),
        ]
    )
    parts = [head, Text(), _render_candidates(view.selection), Text()]
    if view.record is not None:
        from console.staging_view import render_record

        parts += [*render_record(view.record), Text()]
    else:
        stage = f"edgeward models measure {found.name} {found.number}"
        parts += [build_facts([("Staged", f"not measured on this box: {stage}")]), Text()]
    parts += _render_costs(view.costs)
    parts += [Text(), *_render_settings(view)]
    if view.loaded is not None:
        parts += [Text(), _render_loaded(view.loaded)]
    return Group(*parts)


def _render_candidates(selection: "Selection") -> Any:
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
    return build_table(("File", "Form", "MB", "Runtime", "Verdict", "Why"), rows)


def _render_costs(costs: "Costs") -> list[Any]:
    from rich.text import Text

    if costs.kept is None:
        return [build_facts([("Batches", costs.note)])]
    curve = costs.kept.curve
    rows = [
        (
            point.rows,
            f"{point.latency_ms:.4g}",
            f"{point.per_row_ms:.4g}",
            f"{1000 / point.per_row_ms:,.0f}",
            Text("◀ largest batch made", style="green") if point.rows == curve.chosen_rows else " ",
        )
        for point in curve.points
    ]
    head = [("Batches", curve.reason), ("", f"{costs.note}; {costs.kept.path}")]
    return [build_facts(head), build_table(("Rows", "ms", "ms a row", "Rows/s", ""), rows)]


def _render_settings(view: _View) -> list[Any]:
    from rich.text import Text

    if view.problem is not None:
        code, message = view.problem
        return [Text(f"✗ it does not load: {message} [{code}]", style="red")]
    rows = [
        (one.name.replace("_", " "), one.words, one.origin)
        for one in view.settings
        if one.origin != "default" or one.name in _ALWAYS_SHOWN
    ]
    return [build_table(("Setting", "Value", "From"), rows)]


def _render_loaded(loaded: dict[str, Any]) -> Any:
    from rich.console import Group
    from rich.text import Text

    nodes = ", ".join(f"{count} nodes on {name}" for name, count in loaded["assignment"].items())
    facts = [("Loaded", f"by {loaded['runtime']} in {loaded['load_ms']:g} ms")]
    facts.append(("Provider", loaded["provider"] + (f" ({nodes})" if nodes else "")))
    independent = "rows of a batch come back one by one"
    facts.append(("Rows", independent if loaded["is_batchable"] else f"not so that {independent}"))
    findings = [Text(f"✗ {finding}", style="yellow") for finding in loaded["findings"]]
    return Group(build_facts(facts), *(findings or [Text("✓ no findings", style="green")]))


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
