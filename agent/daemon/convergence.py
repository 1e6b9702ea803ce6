"""The way to what the console wants: its `desired` document, model by model.

Owns which document counts (another epoch, or a greater version), and what is missing on this box:
an update, a removal, shares of traffic. Each update goes the way of any update job, so that it can
be followed, explained and cancelled like one.

Invariants: of several documents only the newest is followed; a local pin wins and is reported; what
has been tried for a document is not tried again before another one comes.
"""

import json
import logging
from collections.abc import Callable, Mapping
from typing import Any

from sqlalchemy import Connection

from agent.clock import Clock
from agent.errors import ModelError
from agent.lifecycle import Desired, DesiredModel
from agent.repository import ModelRepository, ModelVersion
from agent.store import deployments as store
from agent.store.facts import read_fact, save_fact
from agent.traffic import Traffic

log = logging.getLogger(__name__)

_DESIRED = "desired"
_TRIED = "desired_tried"

Call = Callable[[Callable[[Connection], Any]], Any]
SubmitUpdate = Callable[[str, DesiredModel, str | None], str]
"""From a model, what is wanted of it and a `dedupe_key` to the id of the update job."""
FindOpen = Callable[[Connection, list[str]], set[str]]
Share = Callable[[str, Traffic | None], None]


class Convergence:
    """Follows the console's document.

    Args:
        clock: wall time.
        repository: of the models.
        call: runs something inside the writer's next transaction.
        find_open: returns which of some jobs have not ended.
        submit: puts an update job into the ledger.
        cancel: cancels one.
        share: shares a model's traffic for as long as the document says.
    """

    def __init__(
        self,
        clock: Clock,
        repository: ModelRepository,
        call: Call,
        find_open: FindOpen,
        submit: SubmitUpdate,
        cancel: Callable[[str], None],
        share: Share,
    ) -> None:
        self._clock = clock
        self._repository = repository
        self._call = call
        self._find_open = find_open
        self._submit = submit
        self._cancel = cancel
        self._share = share
        self._desired: Desired | None = None
        self._tried: dict[str, dict[str, str]] = {}
        """By model: `mark`, what the job was for, and `job`, its id."""
        self._canceled: set[str] = set()

    # --- inside a transaction -------------------------------------------------------------------

    def want(self, tx: Connection, desired: Desired) -> bool:
        """Take a document in; say whether it is newer than the one that is followed."""
        # As it is on the disk: what memory has may be of a transaction that failed.
        known = self._load(tx)
        if known is not None and known.epoch == desired.epoch and known.version >= desired.version:
            return False
        save_fact(tx, _DESIRED, desired.model_dump_json(exclude_defaults=True))
        # How the last update ended is no answer to this document.
        store.forget_states(tx, desired.models)
        self._desired = desired
        return True

    def read(self, tx: Connection) -> Desired | None:
        """Return the document that is followed."""
        if self._desired is None:
            self._desired = self._load(tx)
            self._tried = json.loads(read_fact(tx, _TRIED) or "{}")
        return self._desired

    def _load(self, tx: Connection) -> Desired | None:
        text = read_fact(tx, _DESIRED)
        return None if text is None else Desired.model_validate_json(text)

    # --- the updater's thread -------------------------------------------------------------------

    def step(self, busy: Mapping[str, str]) -> None:
        """Do what is missing for models that have no update under way.

        Args:
            busy: those that have, with the update's job.
        """
        desired = self._desired
        if desired is None:
            return
        for name, wanted in desired.models.items():
            if self._repository.is_pinned(name) or self._give_way(desired, name, wanted, busy):
                continue
            try:
                self._converge(desired, name, wanted)
            except ModelError as exc:
                log.warning("desired state of %s: %s", name, exc)

    def _give_way(
        self, desired: Desired, name: str, wanted: DesiredModel, busy: Mapping[str, str]
    ) -> bool:
        """Say whether a model must wait; an older document's update makes room for this one's."""
        tried = self._tried.get(name)
        if tried is None or tried["mark"] == _mark(desired, wanted):
            return name in busy
        job_id = tried["job"]
        if job_id in self._canceled:
            return name in busy
        if self._call(lambda tx: bool(self._find_open(tx, [job_id]))):
            log.info("%s: another release is wanted now: job %s is cancelled", name, job_id)
            self._cancel(job_id)
            self._canceled.add(job_id)
            return True
        return name in busy

    def _converge(self, desired: Desired, name: str, wanted: DesiredModel) -> None:
        versions = self._list_versions(name)
        if wanted.release is None:
            if versions:
                self._repository.remove(name)
                log.info("%s is removed, as the console wants", name)
            return
        active = next((item for item in versions if item.is_active), None)
        if active is not None and active.release == wanted.release:
            self._share(name, _find_shares(wanted, versions))
            return
        mark = _mark(desired, wanted)
        tried = self._tried.get(name)
        if tried is not None and tried["mark"] == mark and not self._was_refused_a_turn(name):
            return
        window = wanted.window or desired.window
        job_id = self._submit(name, wanted.model_copy(update={"window": window}), None)
        log.info("%s: release %s is wanted: job %s", name, wanted.release, job_id)
        self._tried[name] = {"mark": mark, "job": job_id}

        def save(tx: Connection) -> None:
            store.forget_states(tx, [name])
            save_fact(tx, _TRIED, json.dumps(self._tried))

        self._call(save)

    def _was_refused_a_turn(self, name: str) -> bool:
        """Say whether the update met another one under way: it is sent again when that is over."""
        state = self._call(lambda tx: store.read_states(tx).get(name))
        return state is not None and state["code"] == "update_in_progress"

    def _list_versions(self, name: str) -> list[ModelVersion]:
        if name not in self._repository.list_models():
            return []
        return self._repository.list_versions(name)

    # --- what is reported -------------------------------------------------------------------------

    def describe(self, models: dict[str, Any], desired: Desired | None) -> dict[str, Any]:
        """Return `reported`'s body, with the document that it answers."""
        for name, entry in models.items():
            if self._repository.is_pinned(name):
                entry["status"] = "pinned_local"
        if desired is None:
            return {"models": models, "status": _sum_up(models)}
        for name, wanted in desired.models.items():
            entry = models.setdefault(name, {"active": None, "previous": None, "versions": []})
            entry.setdefault("status", self._find_status(entry, wanted))
            if self._find_status(entry, wanted) == "in_sync" and "candidate" not in entry:
                entry["status"] = "in_sync"
        return {
            "epoch": desired.epoch,
            "desired_version": desired.version,
            "models": models,
            "status": _sum_up(models),
        }

    @staticmethod
    def _find_status(entry: Mapping[str, Any], wanted: DesiredModel) -> str:
        active = entry.get("active")
        release = active["release"] if active else None
        return "in_sync" if release == wanted.release else "applying"


def _mark(desired: Desired, wanted: DesiredModel) -> str:
    return f"{desired.epoch}/{desired.version}/{wanted.release}"


def _find_shares(wanted: DesiredModel, versions: list[ModelVersion]) -> Traffic | None:
    """Return the lasting shares of an A/B test among versions that are here."""
    numbers = {item.release: item for item in versions}
    shares = {
        numbers[release].number: percent
        for release, percent in wanted.traffic.items()
        if release in numbers and not numbers[release].is_active
    }
    if not shares:
        return None
    watch = tuple(sorted({*shares, *(item.number for item in versions if item.is_active)}))
    return Traffic(shares=shares, keep=watch, watch=watch)


def _sum_up(models: Mapping[str, Any]) -> str:
    """Return one word for the box: the one of the model that is farthest from what is wanted."""
    order = ("failed", "rolled_back", "applying", "deferred", "pinned_local")
    found = {entry.get("status", "in_sync") for entry in models.values()}
    return next((status for status in order if status in found), "in_sync")
