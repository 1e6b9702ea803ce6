"""`edgeward console`: a minimal durable console, and what it has kept."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from agent.clock import SystemClock, format_ms
from agent.jobs import Lane
from console.commands.submit import describe_answer
from console.invocation import Invocation, command
from console.output import build_facts, build_table, colour_state

if TYPE_CHECKING:
    from console.mirror import Change

app = typer.Typer(
    help="A durable console of your own: keeps what devices report.", no_args_is_help=True
)

Row = dict[str, Any]

StoreOption = Annotated[
    Path, typer.Option("--store", metavar="FILE", help="The console's SQLite file.")
]
LimitOption = Annotated[int, typer.Option(min=1, max=100_000, help="How many at most.")]
_STORE = Path("console.db")
_QUIET = ("heartbeat", "info", "reported")
"""Changes that would bury the others on a screen."""


def listen(
    call: Invocation,
    store: StoreOption = _STORE,
    device: Annotated[
        list[str] | None,
        typer.Option("--device", metavar="ID", help="A device; may be repeated. Else all."),
    ] = None,
    client_id: Annotated[
        str | None, typer.Option(metavar="ID", help="Name on the broker; else the store's own.")
    ] = None,
    stale_after_s: Annotated[
        float, typer.Option("--stale-after", min=1, metavar="S", help="Mark silent jobs then.")
    ] = 600.0,
) -> None:
    """Keep what devices report, acknowledge it, send what was submitted; until Ctrl-C."""
    import signal
    import threading

    from console.archive import open_archive
    from console.listener import Listener, claim_archive

    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    before = [call.options.device] if call.options.device else []
    with claim_archive(store), open_archive(store, create=True) as archive:
        Listener(
            call.box_settings,
            archive,
            devices=device or before,
            client_id=client_id,
            stale_after_s=stale_after_s,
            show=lambda change: _show(call, change),
            note=call.out.note,
        ).run(stop)


def _show(call: Invocation, change: "Change") -> None:
    """Write one change: a JSON line, or a line for people."""
    if call.out.as_json:
        print(json.dumps(_to_document(change), ensure_ascii=False), flush=True)
    elif change.kind not in _QUIET:
        at = format_ms(SystemClock().wall_ms())[11:19]
        print(f"{at}  {change.device}  {_word(change)}", flush=True)


def _to_document(change: "Change") -> Row:
    job = change.job
    document: Row = {"device": change.device, "kind": change.kind}
    if job is not None:
        document |= {"job_id": job.job_id, "state": job.state, "rev": job.rev}
    if change.name and job is None:
        document["name"] = change.name
    more = {"seq": change.seq, "ledger": change.ledger, "at": change.at, "body": change.body}
    return {**document, **more, "historic": change.is_historic}


def _word(change: "Change") -> str:
    job, body = change.job, change.body
    match change.kind:
        case "state" if job is not None:
            code = (job.reason or {}).get("code")
            why = f"  [{code}]" if code not in (None, "ok") else ""
            return f"{job.job_id}  {job.state}{why}"
        case "result" if job is not None:
            return f"{job.job_id}  result  {describe_answer(body, None)}"
        case "progress" if job is not None:
            return f"{job.job_id}  {body.get('done')} of {body.get('total')}"
        case "stale" if job is not None:
            return f"{job.job_id}  stale: nothing heard of it; last known: {job.state or 'unseen'}"
        case "fresh" if job is not None:
            return f"{job.job_id}  is heard of again"
        case "status":
            return f"is {body.get('state')}"
        case "ledger":
            return f"has another ledger, {body.get('ledger')}: its open jobs are sent again"
        case "lost":
            span = f"{body.get('from_seq')} to {body.get('to_seq')}"
            return f"records {span} never came here, and the device has them no more"
    return f"{change.kind} {change.name}  {json.dumps(body, ensure_ascii=False)[:200]}"


def submit(
    call: Invocation,
    model: Annotated[str, typer.Argument(help="The model's name on the device.")],
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="One job for each.")],
    store: StoreOption = _STORE,
    by_path: Annotated[
        bool, typer.Option("--by-path", help="Send the files' paths on the box, not their bytes.")
    ] = False,
    model_version: Annotated[
        str | None, typer.Option(metavar="V", help="Number or release; else the active one.")
    ] = None,
    lane: Annotated[Lane | None, typer.Option(help="Lane to run in.")] = None,
    priority: Annotated[int, typer.Option(min=0, max=9, help="9 is the most urgent.")] = 5,
) -> None:
    """Put jobs into the store for `--device`; `console listen` sends them, now or later."""
    from console.archive import open_archive
    from console.submission import Wanted, build_submit, read_input, read_reference

    wanted = Wanted(model, model_version, lane and lane.value, priority)
    read = read_reference if by_path else read_input
    commands = [build_submit(wanted, read(path), str(path)) for path in files]
    device = call.box_settings.device_id
    with open_archive(store, create=True) as archive:
        archive.add_commands(device, commands)
    document = {
        "device": device,
        "jobs": [{"job_id": item.job_id, "input": item.shown} for item in commands],
    }
    rows = [(item.shown, item.job_id) for item in commands]
    call.out.show(document, lambda: build_table(("Input", "Job"), rows))


def cancel(
    call: Invocation,
    job_id: Annotated[str, typer.Argument(metavar="ID")],
    store: StoreOption = _STORE,
) -> None:
    """Put a cancel into the store; `console listen` sends it until the job has ended."""
    from console.archive import open_archive
    from console.submission import build_cancel

    with open_archive(store) as archive:
        device = archive.add_cancel(build_cancel(job_id))
    document = {"device": device, "job_id": job_id}
    call.out.show(document, lambda: f"the cancel of {job_id} is kept for {device}")


def list_jobs(
    call: Invocation,
    job_id: Annotated[str | None, typer.Argument(metavar="ID", help="One job, whole.")] = None,
    store: StoreOption = _STORE,
    state: Annotated[
        str | None, typer.Option(help="Only jobs in this state; `unseen`: unanswered.")
    ] = None,
    limit: LimitOption = 20,
) -> None:
    """List jobs, newest first, as last heard of; or show one with its result."""
    from console.archive import open_archive

    with open_archive(store) as archive:
        if job_id is not None:
            found = _to_job(archive.get_job(job_id))
            call.out.show(found, lambda: build_facts(_list_facts(found)))
            return
        rows = archive.list_jobs(call.options.device, state, limit)
    documents = [_to_job(row) for row in rows]
    call.out.show(documents, lambda: _render_jobs(documents))


def _to_job(row: Row) -> Row:
    """Return a row as JSON for scripts: times as text, documents as objects."""
    document = {
        "job_id": row["job_id"],
        "device": row["device"],
        "state": row["state"],
        "rev": row["rev"],
        "attempt": row["attempt"],
        "stale": bool(row["is_stale"]),
        "input": row["shown"],
        "own": row["command"] is not None,
    }
    for name in ("asked", "reported", "received", "heard"):
        value = row[f"{name}_ms"]
        document[f"{name}_at"] = None if value is None else format_ms(value)
    return document | {key: _load(row[key]) for key in ("reason", "progress", "result")}


def _load(text: str | None) -> Any:
    return None if text is None else json.loads(text)


def _list_facts(found: Row) -> list[tuple[str, object]]:
    shown = json.dumps(found["result"], indent=2, ensure_ascii=False) if found["result"] else None
    reason = found["reason"]
    return [
        ("Job", found["job_id"]),
        ("Device", found["device"]),
        ("State", colour_state(_word_state(found))),
        ("Reason", reason and f"{reason.get('message') or ''} [{reason.get('code')}]"),
        ("Attempt", found["attempt"]),
        *((name.capitalize(), found[f"{name}_at"]) for name in ("asked", "heard", "received")),
        ("Result", shown),
    ]


def _word_state(job: Row) -> str:
    return f"{job['state'] or 'unseen'}{', stale' if job['stale'] else ''}"


def _render_jobs(documents: Sequence[Row]) -> Any:
    rows = [
        (
            job["job_id"],
            job["device"],
            colour_state(_word_state(job)),
            describe_answer(job["result"], job["reason"]),
            job["heard_at"],
        )
        for job in documents
    ]
    return build_table(("Job", "Device", "State", "Answer", "Heard of"), rows)


def list_devices(call: Invocation, store: StoreOption = _STORE) -> None:
    """List the devices that were heard of, as they last were."""
    from console.archive import open_archive
    from console.numbering import Numbering

    with open_archive(store) as archive:
        rows = archive.list_devices()
    documents = [
        {
            "device": row["device"],
            "state": row["state"],
            "boot": row["boot"],
            "conn": row["conn"],
            "ledger": row["ledger"],
            "open_jobs": row["open_jobs"],
            "acked_seq": Numbering.from_text(row["spans"]).cumulative if row["spans"] else 0,
            "heard_at": format_ms(row["heard_ms"]),
            **{key: _load(row[key]) for key in ("info", "reported", "heartbeat")},
        }
        for row in rows
    ]
    names = ("device", "state", "open_jobs", "acked_seq", "heard_at")
    cells = [tuple(item[name] for name in names) for item in documents]
    headers = ("Device", "Status", "Open jobs", "Acknowledged", "Heard of")
    call.out.show(documents, lambda: build_table(headers, cells))


def list_events(
    call: Invocation,
    store: StoreOption = _STORE,
    name: Annotated[str | None, typer.Option("--type", help="Only events of this type.")] = None,
    limit: LimitOption = 20,
) -> None:
    """List events, newest first: those of devices, and `ledger`, `lost`, `unreadable`."""
    from console.archive import open_archive

    with open_archive(store) as archive:
        rows = archive.list_events(call.options.device, name, limit)
    documents = [
        {
            "device": row["device"],
            "type": row["kind"],
            "ledger": row["ledger"],
            "seq": row["seq"],
            "at": row["at"],
            "received_at": format_ms(row["received_ms"]),
            "body": json.loads(row["body"]),
        }
        for row in rows
    ]
    cells = [
        (item["received_at"], item["device"], item["type"], json.dumps(item["body"])[:100])
        for item in documents
    ]
    headers = ("Received", "Device", "Type", "Content")
    call.out.show(documents, lambda: build_table(headers, cells))


command(app, "listen")(listen)
command(app, "submit")(submit)
command(app, "cancel")(cancel)
command(app, "jobs")(list_jobs)
command(app, "devices")(list_devices)
command(app, "events")(list_events)
