"""An update from the command line of the box: asked for, watched, told.

Owns the waiting and the wording; the update itself is the agent's.
"""

import json
import time
from collections.abc import Callable, Mapping
from typing import Any

from agent.commands import SUBMIT, UPDATE, new_id
from agent.config import Settings
from agent.jobs import ENDS
from console.boxstate import check_running
from console.dropbox import drop_command
from console.ledger_view import view_ledger
from console.submission import Command, wrap

_POLL_S = 0.2


def build_update(model: str, release: str, params: Mapping[str, Any]) -> Command:
    """Return the command that brings a release of a model into service."""
    job_id = new_id()
    body = {
        "handler": UPDATE,
        "job_id": job_id,
        "model": model,
        "version": release,
        "params": dict(params),
    }
    return Command(job_id, wrap(SUBMIT, body), f"{model} {release}")


def run_update(
    settings: Settings, command: Command, timeout_s: float, tell: Callable[[str], None]
) -> dict[str, Any]:
    """Ask the agent for an update and wait for its end.

    Args:
        settings: of the box.
        command: from `build_update`.
        timeout_s: how long to wait at most.
        tell: told each time something has changed.

    Returns:
        The job's document: `job_id`, `state`, `reason`, `result`.

    Raises:
        AgentDownError: no agent runs here.
    """
    check_running(settings)
    drop_command(settings, command)
    deadline = time.monotonic() + timeout_s
    told = ""
    with view_ledger(settings) as ledger:
        while True:
            row = ledger.find_jobs([command.job_id]).get(command.job_id)
            words = _word(row, ledger.find_phase(command.job_id))
            if words != told:
                told = words
                tell(words)
            if (row is not None and row["state"] in ENDS) or time.monotonic() >= deadline:
                return _describe(command, row)
            time.sleep(_POLL_S)


def _word(row: Mapping[str, Any] | None, phase: str | None) -> str:
    if row is None:
        return "asked"
    if row["state"] in ENDS:
        return str(row["state"])
    if phase is not None:
        return phase.replace("_", " ")
    progress = json.loads(row["progress"]) if row["progress"] else None
    if progress is None:
        return "waits for a maintenance worker" if row["state"] == "queued" else "staging"
    if progress["unit"] == "bytes":
        return f"fetching, {progress['done'] / 1e6:.1f} of {progress['total'] / 1e6:.1f} MB"
    return f"staging, {progress['done']} of {progress['total']} {progress['unit']}"


def _describe(command: Command, row: Mapping[str, Any] | None) -> dict[str, Any]:
    document: dict[str, Any] = {"job_id": command.job_id, "state": None, "reason": None}
    if row is None:
        return document
    document["state"] = row["state"]
    document["reason"] = {"code": row["reason_code"], "message": row["reason"]}
    document["result"] = json.loads(row["result"]) if row["result"] else None
    return document
