"""The desired and reported documents, as a rollout reads and writes them.

Pure. A rollout changes the entry of one model in a device's desired document and leaves the
rest of it as it is; it judges a report only by what it says about that model.

Invariants: a document that is built has the epoch of the one before and a version above every
one that was heard of in that epoch; a report counts only if it was made after the device took
the document that is waited for.

Source: docs/protocol.md, "Desired and reported models".
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic_core import from_json

from agent.commands import VERSION, new_id
from console.rollout.progress import NO_CAUSE, Cause, News
from console.submission import wrap

TYPE = "desired"

Document = dict[str, Any]

_FAILURES = ("failed", "rolled_back")
_PROBATION_S = 600.0
"""A device's own, where nobody says: `agent.lifecycle.Probation`."""


@dataclass(frozen=True)
class Desired:
    """One desired document."""

    epoch: str
    version: int
    body: Document

    def find_entry(self, model: str) -> Document | None:
        """Return the entry of a model, or None where the document does not name it."""
        entry = _object(self.body.get("models")).get(model)
        return entry if isinstance(entry, dict) else None


@dataclass(frozen=True)
class Expected:
    """What a report is judged by: a document that was sent, and the release that it names."""

    model: str
    release: str | None
    """None: the model is to be removed."""
    epoch: str
    version: int


@dataclass(frozen=True)
class Verdict:
    """What a report says about what was asked for."""

    news: News
    detail: str = ""
    reason: Cause = NO_CAUSE


def read_desired(payload: bytes) -> Desired | None:
    """Return a desired document, or None where the payload is none."""
    try:
        envelope = from_json(payload)
    except ValueError:
        return None
    if not isinstance(envelope, dict) or envelope.get("type") != TYPE:
        return None
    body = envelope.get("body")
    if envelope.get("v", VERSION) != VERSION or not isinstance(body, dict):
        return None
    epoch, version = body.get("epoch"), body.get("version")
    if not isinstance(epoch, str) or type(version) is not int or version < 1:
        return None
    return Desired(epoch, version, body)


def choose_base(heard: Desired | None, kept: Desired | None) -> Desired | None:
    """Return the document to build on: the retained one, or ours where the broker has an older.

    A retained document of another epoch than ours was written by somebody on purpose.
    """
    if heard is None or kept is None:
        return heard or kept
    return kept if kept.epoch == heard.epoch and kept.version > heard.version else heard


def build_desired(
    base: Desired | None, reported: Mapping[str, Any] | None, model: str, entry: Document
) -> Desired:
    """Return the next document of a device, with another entry for one model.

    Args:
        base: the document before; None: there is none.
        reported: the body of the device's report: it may have applied a version that nobody
            else remembers.
        model: the model.
        entry: its new entry.
    """
    epoch, version = _find_applied(reported)
    if base is not None:
        version = max(base.version, version if epoch == base.epoch else 0)
        epoch = base.epoch
    body = dict(base.body) if base is not None else {}
    models = {**_object(body.get("models")), model: entry}
    chosen = epoch or new_id()
    body |= {"epoch": chosen, "version": version + 1, "models": models}
    return Desired(chosen, version + 1, body)


def build_entry(before: Document | None, release: str, probation: Document | None) -> Document:
    """Return a model's entry for a release: its policy and window stay as they are.

    `traffic` does not: it shares requests among releases by name.
    """
    entry = {key: value for key, value in (before or {}).items() if key != "traffic"}
    if probation is not None:
        entry["probation"] = probation
    return {**entry, "release": release}


def find_watch_s(entry: Mapping[str, Any] | None) -> float:
    """Return for how long an entry lets a device watch a new version before it says more."""
    watched = _object((entry or {}).get("probation")).get("duration_s", _PROBATION_S)
    shadowed = _object((entry or {}).get("rollout")).get("shadow_s", 0.0)
    found = [item for item in (watched, shadowed) if isinstance(item, int | float)]
    return float(sum(found))


def encode_desired(desired: Desired) -> str:
    """Return the payload of a document."""
    return wrap(TYPE, desired.body)


def find_active(reported: Mapping[str, Any] | None, model: str) -> str | None:
    """Return the release of a model that a device reports as active."""
    entry = _object(_object((reported or {}).get("models")).get(model))
    release = _object(entry.get("active")).get("release")
    return release if isinstance(release, str) else None


def read_report(reported: Mapping[str, Any] | None, expected: Expected) -> Verdict | None:
    """Return what a device's report says about what was asked for; None: nothing."""
    epoch, version = _find_applied(reported)
    if reported is None or epoch != expected.epoch or version < expected.version:
        return None
    models = _object(reported.get("models"))
    entry = _object(models.get(expected.model))
    active = _object(entry.get("active")).get("release")
    candidate = _object(entry.get("candidate"))
    status = entry.get("status")
    if expected.release is None and not active and not candidate:
        return Verdict(News.SUCCESS, "removed")
    if candidate.get("release", expected.release) != expected.release:
        return None
    if status == "in_sync":
        is_done = active == expected.release and not candidate
        return Verdict(News.SUCCESS, "in_sync") if is_done else None
    if status in _FAILURES:
        if _object(entry.get("last")).get("release", expected.release) != expected.release:
            # How an earlier update ended; the one that is asked for has not begun.
            return None
        return Verdict(News.FAILURE, str(status), _read_reason(entry, str(status)))
    if status == "pinned_local":
        return Verdict(News.PIN, str(status), _read_reason(entry, str(status)))
    if status in ("applying", "deferred"):
        detail = candidate.get("state") if status == "applying" else None
        return Verdict(News.WORKING, str(detail or status), _read_reason(entry, ""))
    return None


def _read_reason(entry: Mapping[str, Any], fallback: str) -> Cause:
    reason = _object(entry.get("reason"))
    return Cause(str(reason.get("code") or fallback)[:64], str(reason.get("message") or "")[:500])


def _find_applied(reported: Mapping[str, Any] | None) -> tuple[str | None, int]:
    """Return the epoch and version that a device says it has applied; version 0: none."""
    epoch, version = (reported or {}).get("epoch"), (reported or {}).get("desired_version")
    if not isinstance(epoch, str) or type(version) is not int:
        return None, 0
    return epoch, version


def _object(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}
