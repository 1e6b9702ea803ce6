"""`edgeward status`, `doctor` and `config`: how this box is, and how it is set."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import typer

from console.exits import Exit
from console.invocation import Invocation, command, end_with
from console.output import build_facts, build_table

if TYPE_CHECKING:
    from agent.config import Settings
    from console.boxstate import BoxStatus

config_app = typer.Typer(help="Settings of this box.", no_args_is_help=True)
_PANEL_UNKNOWN = "unknown"


def register(app: typer.Typer) -> None:
    """Add the commands to `app`."""
    command(app, "status")(show_status)
    command(app, "doctor")(examine)
    app.add_typer(config_app, name="config")


def show_status(call: Invocation) -> None:
    """Say how the agent of this box is. Ends with 7 where it does not run."""
    from agent.repository import ModelRepository
    from console.boxstate import read_status

    settings = call.box_settings
    status = read_status(settings)
    repository = ModelRepository(settings.models_dir)
    document = {
        "device": settings.device_id,
        "running": status.is_running,
        "status": status.values,
        "jobs": _count_jobs(settings),
        "models": repository.list_models(),
    }
    call.out.show(document, lambda: _render_status(document, status))
    end_with(Exit.OK if status.is_running else Exit.AGENT_DOWN)


def _count_jobs(settings: "Settings") -> dict[str, int]:
    from agent.errors import StoreError
    from console.ledger_view import view_ledger

    try:
        with view_ledger(settings) as ledger:
            return ledger.count_states()
    except StoreError:
        # A box that has never run has no ledger, and no jobs.
        return {}


def _render_status(document: dict[str, Any], status: "BoxStatus") -> Any:
    values = status.values
    outbox, resources = values.get("outbox", {}), values.get("resources", {})
    jobs = ", ".join(f"{count} {state}" for state, count in sorted(document["jobs"].items()))
    rows: list[tuple[str, object]] = [
        ("Device", document["device"]),
        ("Agent", _word_agent(status)),
        ("Jobs", jobs or "none yet"),
        ("Models", ", ".join(document["models"]) or "none: `edgeward models add`"),
    ]
    if values:
        rows += [
            ("MQTT", values.get("mqtt", _PANEL_UNKNOWN)),
            ("Queue broker", values.get("queue_broker", _PANEL_UNKNOWN)),
            ("Workers", values.get("workers", _PANEL_UNKNOWN)),
            ("Outbox", f"{outbox.get('depth', 0)} waiting, {outbox.get('published', 0)} sent"),
            ("Ledger", values.get("store", _PANEL_UNKNOWN)),
            ("Resources", _word_resources(resources)),
        ]
    return build_facts(rows)


def _word_agent(status: "BoxStatus") -> Any:
    from rich.text import Text

    from agent.clock import format_ms

    if status.is_running:
        return Text(f"running, up {_word_span(status.values.get('uptime_s', 0.0))}", style="green")
    if status.at_ms is None:
        return Text("does not run, and never has on this data folder", style="red")
    return Text(f"does not run; last heard of at {format_ms(status.at_ms)}", style="red")


def _word_span(seconds: float) -> str:
    for size, unit in ((86_400, "d"), (3_600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"


def _word_resources(resources: dict[str, Any]) -> str:
    shown = {key.replace("_", " "): value for key, value in resources.items() if value is not None}
    return ", ".join(f"{name} {value}" for name, value in shown.items())


def examine(call: Invocation) -> None:
    """Examine this box, its runtimes and its brokers, and say what to do."""
    from console.doctor import choose_targets, collect, print_report

    targets = choose_targets(call.box_settings)
    with call.out.spinner("examining this box"):
        report = collect(targets)
    if call.out.as_json:
        call.out.show(report.to_json(), lambda: "")
    else:
        print_report(report)
    end_with(Exit.ERROR if report.exit_code else Exit.OK)


def show_config(call: Invocation) -> None:
    """Show every setting, its value, and where that came from."""
    from console.settings_view import list_settings

    lines = list_settings(call.settings, call.options.config, call.options.to_flags())
    call.out.show(
        [asdict(line) for line in lines],
        lambda: build_table(
            ("Setting", "Value", "From", "Meaning"),
            [(line.key, _word_value(line.value), line.origin, line.description) for line in lines],
        ),
    )


def _word_value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "–"
    return "–" if value is None else str(value)


command(config_app, "show")(show_config)
