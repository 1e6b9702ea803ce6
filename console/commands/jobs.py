"""`edgeward jobs`: what the ledger of this box says of its jobs, and cancelling one."""

import json
from typing import Annotated, Any

import typer

from agent.clock import format_ms
from agent.jobs import ENDS, JobState
from console.commands.submit import describe_answer
from console.errors import AgentDownError, WaitTimedOutError
from console.exits import Exit
from console.invocation import Invocation, command, end_with
from console.output import build_facts, build_table, colour_state

app = typer.Typer(help="Jobs in the ledger of this box.", no_args_is_help=True)

Row = dict[str, Any]
_TIMES = ("created", "started", "ended")


def list_jobs(
    call: Invocation,
    state: Annotated[JobState | None, typer.Option(help="Only jobs in this state.")] = None,
    model: Annotated[str | None, typer.Option(help="Only jobs of this model.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=10_000, help="How many at most.")] = 20,
) -> None:
    """List jobs, newest first."""
    from console.ledger_view import view_ledger

    with view_ledger(call.settings) as ledger:
        rows = ledger.list_jobs(state, model, limit)
        counts = ledger.count_states()
    call.out.show([to_document(row) for row in rows], lambda: _render_list(rows))
    if len(rows) < sum(counts.values()):
        shown = ", ".join(f"{count} {name}" for name, count in sorted(counts.items()))
        call.out.note(f"{len(rows)} shown; in the ledger: {shown}")


def show_job(call: Invocation, job_id: Annotated[str, typer.Argument(metavar="ID")]) -> None:
    """Show all that is known of one job, its input aside."""
    from console.ledger_view import view_ledger

    with view_ledger(call.settings) as ledger:
        row = ledger.get_job(job_id)
        history = ledger.list_transitions(job_id)
    document = {**to_document(row), "transitions": [to_document(step) for step in history]}
    call.out.show(document, lambda: _render_job(document))


def cancel_job(
    call: Invocation,
    job_id: Annotated[str, typer.Argument(metavar="ID")],
    wait_s: Annotated[
        float, typer.Option("--wait", min=0, metavar="S", help="How long to wait for its end.")
    ] = 15.0,
    over_mqtt: Annotated[bool, typer.Option("--mqtt", help="Ask over MQTT.")] = False,
) -> None:
    """Cancel a job that has not ended, and wait until it has."""
    with call.out.spinner(f"canceling {job_id}"):
        cancel = _cancel_over_mqtt if over_mqtt else _cancel_locally
        state, reason = cancel(call, job_id, wait_s)
    document = {"job_id": job_id, "state": state.value, "reason": reason}
    call.out.show(document, lambda: build_facts([("Job", job_id), ("State", colour_state(state))]))
    if state is not JobState.CANCELED:
        call.out.note("it had ended before it could be canceled")
        end_with(Exit.NOT_AS_ASKED)


def _cancel_locally(call: Invocation, job_id: str, wait_s: float) -> tuple[JobState, Any]:
    from console.boxstate import check_running
    from console.dropbox import drop_command
    from console.ledger_view import view_ledger
    from console.submission import build_cancel

    with view_ledger(call.settings) as ledger:
        row = ledger.get_job(job_id)
        if row["state"] not in ENDS:
            drop_command(call.settings, build_cancel(job_id))
            try:
                check_running(call.settings)
            except AgentDownError as exc:
                msg = f"{exc}; the cancel waits in the inbox for it"
                raise AgentDownError(msg) from exc
            row = ledger.wait_for_ends([job_id], wait_s, lambda _rows: None)[job_id]
    if row["state"] not in ENDS:
        raise _not_ended(job_id, wait_s)
    return JobState(row["state"]), to_document(row)["reason"]


def _cancel_over_mqtt(call: Invocation, job_id: str, wait_s: float) -> tuple[JobState, Any]:
    from console.link import ConsoleLink
    from console.submission import build_cancel

    with ConsoleLink(call.box_settings) as link:
        link.cancel(build_cancel(job_id))
        link.wait(lambda: link.jobs[job_id].state in ENDS, wait_s)
        job = link.jobs[job_id]
    if job.state is None or job.state not in ENDS:
        raise _not_ended(job_id, wait_s)
    return job.state, job.reason


def _not_ended(job_id: str, wait_s: float) -> WaitTimedOutError:
    msg = f"job {job_id} has not ended within {wait_s:g} s; a running one is let finish its batch"
    return WaitTimedOutError(msg)


def to_document(row: Row) -> dict[str, Any]:
    """Return a ledger row as JSON for scripts: times as text, the result as an object."""
    hidden = {"body", "body_hash", "seq", "urgency", "reason_code", "expires_boot_ms", "boot_id"}
    document = {key: value for key, value in row.items() if key not in hidden}
    for key in [key for key in document if key.endswith("_ms")]:
        value = document.pop(key)
        document[f"{key.removesuffix('_ms')}_at"] = None if value is None else format_ms(value)
    if "urgency" in row:
        document["priority"] = 9 - row["urgency"]
    code = row.get("reason_code")
    document["reason"] = code and {"code": code, "message": row.get("reason") or ""}
    if "result" in row:
        document["result"] = json.loads(row["result"]) if row["result"] else None
    return document


def _render_list(rows: list[Row]) -> Any:
    cells = [
        (
            row["job_id"],
            colour_state(row["state"]),
            row["model"],
            row["source"],
            format_ms(row["created_ms"])[5:-5].replace("T", " "),
            None if row["ended_ms"] is None else row["ended_ms"] - row["created_ms"],
            None if row["reason_code"] == "ok" else row["reason_code"],
        )
        for row in rows
    ]
    return build_table(("Job", "State", "Model", "From", "Created (UTC)", "ms", "Reason"), cells)


def _render_job(document: dict[str, Any]) -> Any:
    from rich.console import Group
    from rich.text import Text

    reason = document["reason"]
    facts = build_facts(
        [
            ("Job", document["job_id"]),
            ("State", colour_state(document["state"])),
            ("Reason", reason and f"{reason['message'] or reason['code']} [{reason['code']}]"),
            ("Model", document["model"]),
            ("Answer", describe_answer(document["result"], None)),
            ("Lane", f"{document['lane']}, priority {document['priority']}"),
            ("From", document["source"]),
            ("Attempts", f"{document['attempt']} of {document['max_attempts']}"),
            *((name.capitalize(), document[f"{name}_at"]) for name in _TIMES),
        ]
    )
    if document["result"] is None:
        return facts
    result = json.dumps(document["result"], indent=2, ensure_ascii=False)
    return Group(facts, Text("\nResult", style="bold"), Text(result))


command(app, "list")(list_jobs)
command(app, "show")(show_job)
command(app, "cancel")(cancel_job)
