"""`edgeward submit`: files become jobs, and their answers a table."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from agent.jobs import ENDS, JobState, Lane
from console.exits import Exit
from console.invocation import Invocation, command, end_with
from console.output import build_table, colour_state

if TYPE_CHECKING:
    from console.submission import Command

_ACCEPT_S = 10.0
"""With `--wait 0`: how long the box may take to say that it has the jobs."""

JobDocument = dict[str, Any]


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    command(app, "submit")(submit_jobs)


def submit_jobs(
    call: Invocation,
    model: Annotated[str, typer.Argument(help="The model's name on the box.")],
    files: Annotated[
        list[Path] | None,
        typer.Argument(metavar="FILE", help="More inputs, so that a shell's *.png works."),
    ] = None,
    inputs: Annotated[
        list[Path] | None, typer.Option("--input", "-i", metavar="FILE", help="One job's input.")
    ] = None,
    wait_s: Annotated[
        float,
        typer.Option("--wait", min=0, metavar="S", help="How long to wait; 0: until accepted."),
    ] = 60.0,
    by_path: Annotated[
        bool, typer.Option("--by-path", help="Send the files' paths on the box, not their bytes.")
    ] = False,
    is_local: Annotated[
        bool, typer.Option("--local", help="Through this box's inbox instead of MQTT.")
    ] = False,
    model_version: Annotated[
        str | None, typer.Option(metavar="V", help="Number or release; else the active one.")
    ] = None,
    lane: Annotated[Lane | None, typer.Option(help="Lane to run in.")] = None,
    priority: Annotated[int, typer.Option(min=0, max=9, help="9 is the most urgent.")] = 5,
) -> None:
    """Submit a job for each input file, wait for the answers and show them."""
    paths = [*(inputs or ()), *(files or ())]
    if not paths:
        raise typer.BadParameter("name at least one input file", param_hint="--input")
    from console.submission import Wanted, build_submit, read_input, read_reference

    wanted = Wanted(model, model_version, lane and lane.value, priority)
    read = read_reference if by_path else read_input
    commands = [build_submit(wanted, read(path), str(path)) for path in paths]
    send = _send_locally if is_local else _send_over_mqtt
    documents = send(call, commands, wait_s)
    call.out.show({"jobs": documents}, lambda: _render(documents))
    end_with(_judge(documents, waited=wait_s > 0))


def _send_over_mqtt(
    call: Invocation, commands: Sequence["Command"], wait_s: float
) -> list[JobDocument]:
    from console.link import ConsoleLink

    ids = [item.job_id for item in commands]
    with ConsoleLink(call.box_settings) as link, call.out.progress("jobs") as progress:
        moved = _count_in(progress, len(ids))

        def count() -> int:
            jobs = link.jobs
            done = sum(
                jobs[key].is_complete if wait_s else jobs[key].state is not None for key in ids
            )
            moved(done)
            return done

        link.submit(commands)
        link.wait(lambda: count() == len(ids), wait_s or _ACCEPT_S)
        jobs = link.jobs
        if link.device_state != "online" and any(jobs[key].state is None for key in ids):
            state = link.device_state or "not known to this broker"
            call.out.note(f"device {call.box_settings.device_id} is {state}")
    return [
        _document(item, jobs[item.job_id].state, jobs[item.job_id].reason, jobs[item.job_id].result)
        for item in commands
    ]


def _send_locally(
    call: Invocation, commands: Sequence["Command"], wait_s: float
) -> list[JobDocument]:
    from console.boxstate import check_running
    from console.dropbox import drop_command
    from console.ledger_view import view_ledger

    check_running(call.settings)
    for item in commands:
        drop_command(call.settings, item)
    ids = [item.job_id for item in commands]
    with view_ledger(call.settings) as ledger, call.out.progress("jobs") as progress:
        moved = _count_in(progress, len(ids))
        rows = ledger.wait_for_ends(
            ids, wait_s, lambda rows: moved(sum(row["state"] in ENDS for row in rows.values()))
        )
    return [_document(item, *_read_row(rows.get(item.job_id))) for item in commands]


def _read_row(
    row: dict[str, Any] | None,
) -> tuple[JobState | None, dict[str, Any] | None, dict[str, Any] | None]:
    import json

    if row is None:
        return None, None, None
    reason = row["reason_code"] and {"code": row["reason_code"], "message": row["reason"]}
    return JobState(row["state"]), reason, json.loads(row["result"]) if row["result"] else None


def _count_in(progress: Any, total: int) -> Callable[[int], None]:
    """Return what moves the bar, if there is one."""
    if progress is None:
        return lambda _done: None
    task = progress.add_task("waiting for answers", total=total)
    return lambda done: progress.update(task, completed=done)


def _document(
    item: "Command",
    state: JobState | None,
    reason: dict[str, Any] | None,
    result: dict[str, Any] | None,
) -> JobDocument:
    return {
        "job_id": item.job_id,
        "input": item.shown,
        "state": state and state.value,
        "reason": reason,
        "result": result,
    }


def _judge(documents: Sequence[JobDocument], *, waited: bool) -> Exit:
    states = {item["state"] for item in documents}
    if states & (ENDS - {JobState.SUCCEEDED}):
        return Exit.NOT_AS_ASKED
    unfinished = None in states or (waited and states != {JobState.SUCCEEDED})
    return Exit.TIMED_OUT if unfinished else Exit.OK


def _render(documents: Sequence[JobDocument]) -> Any:
    rows = [
        (
            item["input"],
            colour_state(item["state"] or "no answer"),
            describe_answer(item["result"], item["reason"]),
            describe_time(item["result"]),
            item["job_id"],
        )
        for item in documents
    ]
    return build_table(("Input", "State", "Answer", "ms", "Job"), rows)


def describe_answer(result: JobDocument | None, reason: JobDocument | None) -> str:
    """Return a job's answer in a few words: the best label and its score, or why there is none."""
    if result is None:
        return f"{reason['message'] or reason['code']}" if reason else ""
    output = result.get("output")
    if isinstance(output, list) and output and isinstance(output[0], dict):
        best = output[0]
        if "label" in best:
            return f"{best['label']}  {best.get('score', 0):.1%}"
    if isinstance(output, dict) and "file" in output:
        return f"in the file {output['file']} on the box"
    return _shorten(output)


def _shorten(output: object, limit: int = 60) -> str:
    from agent.commands import encode

    text = encode(output)
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def describe_time(result: JobDocument | None) -> str:
    """Return how long a job ran, its wait for a worker aside, in ms."""
    timings = (result or {}).get("timings_ms", {})
    ran = sum(timings.get(part, 0.0) for part in ("pre", "infer", "post"))
    return f"{ran:.1f}" if timings else ""
