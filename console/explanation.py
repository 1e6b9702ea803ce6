"""Why a job is where it is, in sentences.

Pure: a job's row, its history, its reports, the agent's status and the time in, words out.
Windows are in the local time of the box.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from agent.clock import format_ms
from agent.jobs import ENDS, JobState
from agent.window import BoxView, Window, find_closed
from console.boxstate import BoxStatus

Row = dict[str, Any]


@dataclass(frozen=True)
class Step:
    """One step of a job's history, in words."""

    at: str
    after_ms: int
    """Since the step before; 0 for the first."""
    state: str
    attempt: int
    reason: str


def explain_job(
    row: Row, status: BoxStatus, ahead: int, now_ms: int, boot_ms: int | None = None
) -> list[str]:
    """Return why a job is in its state, most important first.

    Args:
        row: the job; columns that an older ledger lacks may be missing.
        status: what the agent last said.
        ahead: how many queued jobs of its lane go before it.
        now_ms: the time.
        boot_ms: the time on the boot clock, where back-offs are kept; None: not known.
    """
    state = JobState(row["state"])
    if state in ENDS:
        return [_word_end(row), *_word_hint(row), *_word_timings(row)]
    if state is JobState.RUNNING:
        return [*_word_running(row, now_ms), *_word_box(status)]
    return _word_waiting(row, status, ahead, now_ms, boot_ms)


def explain_reports(
    row: Row, records: Sequence[Row], acknowledged_by: str, status: BoxStatus
) -> list[str]:
    """Return what is still to be reported of a job, and who has the rest.

    Args:
        row: the job.
        records: its outbox records: `kind`, and `seq`, which is None before the first publish.
        acknowledged_by: whose acknowledgement removes records, `console` or `broker`.
        status: what the agent last said.
    """
    mqtt = status.values.get("mqtt", "online") if status.is_running else "online"
    if mqtt == "disabled":
        return ["MQTT is disabled: nothing of it is reported."]
    who = "a console" if acknowledged_by == "console" else "the MQTT broker"
    sentences = []
    if records:
        waiting = ", ".join(_word_record(record) for record in records)
        sentences.append(f"Still to be acknowledged by {who}: {waiting}.")
    elif JobState(row["state"]) in ENDS:
        sentences.append(f"All of it is reported, and acknowledged by {who}.")
    if mqtt != "online":
        sentences.append(f"MQTT is {mqtt}: its reports wait; the job itself does not need it.")
    return sentences


def _word_record(record: Row) -> str:
    if record["seq"] is None:
        return f"{record['kind']} (not sent yet)"
    return f"{record['kind']} (number {record['seq']})"


def _word_end(row: Row) -> str:
    took_ms = row["ended_ms"] - row["created_ms"]
    text = f"It ended {row['state']} after {took_ms} ms"
    code = row["reason_code"]
    if code in (None, "ok"):
        return f"{text}."
    return f"{text}: {row['reason'] or code} [{code}]."


def _word_hint(row: Row) -> list[str]:
    """Return what stands behind an end, where its code alone does not say it."""
    key, model = row.get("dedupe_key"), row.get("model")
    hints = {
        "dedupe_dropped": f"Another job with its dedupe_key {key!r} was open when it came.",
        "replaced": f"A newer job with its dedupe_key {key!r} took its place.",
        "poison_job": f"Its attempts crashed the worker {row.get('crashes') or 2} times.",
        "model_quarantined": f"Versions that crash workers are not served; `edgeward status` "
        f"shows them, `edgeward models trust {model}` releases one.",
        "storage_full": "The disk is low: `edgeward doctor` says how low.",
        "payload_damaged": "The disk has changed what was stored: look at its health.",
    }
    hint = hints.get(row["reason_code"] or "")
    return [hint] if hint else []


def _word_timings(row: Row) -> list[str]:
    if row["started_ms"] is None:
        return ["It never ran."]
    waited_ms = max(0, row["started_ms"] - row["created_ms"])
    attempts = row["attempt"]
    tries = "in the first attempt" if attempts <= 1 else f"and took {attempts} attempts"
    return [f"It waited {waited_ms} ms for a worker, {tries}."]


def _word_running(row: Row, now_ms: int) -> list[str]:
    running_s = (now_ms - (row["started_ms"] or now_ms)) / 1000
    limit = f"its limit is {row['run_timeout_s']:g} s"
    sentences = [f"It runs since {running_s:.1f} s, in attempt {row['attempt']}; {limit}."]
    progress = _read_object(row.get("progress"))
    if progress:
        unit = f" {progress['unit']}" if progress.get("unit") else ""
        eta_s = progress.get("eta_s")
        left = f"; about {eta_s:g} s are left" if isinstance(eta_s, int | float) else ""
        done, total = progress.get("done"), progress.get("total")
        sentences.append(f"It has done {done} of {total}{unit}{left}.")
    return sentences


def _word_box(status: BoxStatus) -> list[str]:
    if not status.is_running:
        return ["The agent does not run: start it with `edgeward up` or its systemd unit."]
    return []


def _word_waiting(
    row: Row, status: BoxStatus, ahead: int, now_ms: int, boot_ms: int | None
) -> list[str]:
    """Return what a queued job waits for."""
    values = status.values if status.is_running else {}
    sentences = [
        *_word_box(status),
        *_word_time(row, now_ms, boot_ms),
        *_word_quarantine(row, values),
        *_word_brokers(row, values),
        *_word_tries(row),
    ]
    if ahead:
        sentences.append(f"{ahead} jobs of lane {row['lane']} go before it.")
    if row["task_id"] is not None:
        sentences.append(
            "It is in the queue broker or at a worker, which has not begun it yet; where no "
            f"worker serves lane {row['lane']}, it stays there."
        )
    elif ahead and values.get("tasks"):
        sentences.append(f"{values['tasks']} tasks are under way: its lane is full.")
    return sentences or ["It is about to be dispatched."]


def _word_time(row: Row, now_ms: int, boot_ms: int | None) -> list[str]:
    """Return which moment a job waits for: `not_before`, its window or the end of a back-off."""
    not_before_ms, ready_ms = row["not_before_ms"], row.get("ready_boot_ms")
    if not_before_ms is not None and not_before_ms > now_ms:
        return [f"It may not start before {format_ms(not_before_ms)} (not_before)."]
    wait_ms = ready_ms - boot_ms if ready_ms is not None and boot_ms is not None else 0
    window = _read_object(row.get("options")).get("window")
    if window and (why := _word_window(window, now_ms, wait_ms)):
        return [why]
    if wait_ms <= 0:
        return []
    until = format_ms(now_ms + wait_ms)
    return [f"It is tried again at {until}, in {wait_ms / 1000:.1f} s (back-off)."]


def _word_window(given: Row, now_ms: int, wait_ms: int) -> str | None:
    """Return why a maintenance window is closed, as far as the time alone tells."""
    window = Window.model_validate(given)
    closed = find_closed(window, datetime.fromtimestamp(now_ms / 1000), BoxView())
    if closed is not None:
        return f"Its maintenance window is closed: {closed.why}."
    wishes = [
        *(["an idle box"] if window.idle else []),
        *(["mains power"] if window.on_mains else []),
        *([f"at most {window.max_temperature_c:g} °C"] if window.max_temperature_c else []),
        *([f"{window.min_free_mb:g} MB of free disk"] if window.min_free_mb else []),
    ]
    if wait_ms > 0 and wishes:
        return (
            f"Its maintenance window asks for {', '.join(wishes)}; it is looked at again in "
            f"{wait_ms / 1000:.0f} s."
        )
    return None


def _word_quarantine(row: Row, values: Row) -> list[str]:
    """Say which versions of a job's model are not served."""
    blocked = values.get("quarantine", {}).get(row.get("model"), {})
    return [
        f"Version {version} of model {row['model']} is in quarantine: {why}."
        for version, why in blocked.items()
        if row.get("version") in (None, version)
    ]


def _word_brokers(row: Row, values: Row) -> list[str]:
    """Return what of the box's own parts holds work up."""
    sentences = []
    if values.get("store", "ok") != "ok":
        sentences.append(f"The ledger cannot be written: {values['store']}.")
    if values.get("storage", {}).get("low"):
        sentences.append("The disk is low: new work is refused, what is accepted goes on.")
    if values.get("queue_broker", "reachable") != "reachable":
        sentences.append(f"The queue broker is unreachable: {values['queue_broker']}.")
    elif values.get("workers", 1) == 0:
        lane = row["lane"]
        sentences.append(f"No worker is alive: start one with `edgeward worker --lane {lane}`.")
    return sentences


def _word_tries(row: Row) -> list[str]:
    """Return how earlier attempts went."""
    sentences = []
    last = row["reason"] or row["reason_code"] or "interrupted"
    if row["interruptions"]:
        sentences.append(f"{row['interruptions']} attempts were interrupted; the last: {last}.")
    if row.get("failures"):
        sentences.append(f"{row['failures']} attempts ended in an error; the last: {last}.")
    if row.get("crashes"):
        sentences.append(f"{row['crashes']} of its attempts crashed the worker.")
    return sentences


def _read_object(text: str | None) -> Row:
    document = json.loads(text) if text else {}
    return document if isinstance(document, dict) else {}


def list_steps(history: Sequence[Row]) -> list[Step]:
    """Return a job's history in words, oldest first."""
    steps = []
    before_ms = history[0]["at_ms"] if history else 0
    for row in history:
        steps.append(
            Step(
                format_ms(row["at_ms"]),
                row["at_ms"] - before_ms,
                row["state"],
                row["attempt"],
                row["reason_code"] or "",
            )
        )
        before_ms = row["at_ms"]
    return steps
