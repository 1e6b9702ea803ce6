"""The updater: brings a staged version to its place, watches it there, commits it or goes back.

    update job: fetched and staged by a maintenance worker
        └► waiting ─► shadow ─► canary … ─► activating ─► probation ─► committing ─► (succeeded)
              │          │         │             │            │
              └──────────┴─────────┴─────────────┴────────────┴─► rolling_back ─► (failed)

Owns every step after staging, and the box's way to what the console wants (`desired`). A phase is
committed before what it does to the disk, and doing that twice is harmless: so the process may be
killed anywhere, and its next start goes on from the phase that the ledger names.

Invariants: the active version changes by one rename; until the commit the previous version is on
the disk and loaded; a machine that was restarted while a candidate had traffic goes back; only the
end of a probation commits; a candidate that failed is marked bad and not tried again.

Source: docs/lifecycle.md.
"""

import json
import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from typing import Any

from sqlalchemy import Connection

from agent.clock import Clock
from agent.commands import encode
from agent.config import Settings
from agent.daemon.convergence import Convergence, SubmitUpdate
from agent.daemon.gate import FigureBook, Tally, find_objection, is_enough, subtract
from agent.daemon.messages import Ended
from agent.errors import (
    AgentError,
    DigestMismatchError,
    ManifestError,
    ModelError,
    ModelNotFoundError,
    VersionNotFoundError,
)
from agent.faults import reach
from agent.jobs import JobState, Reason
from agent.lifecycle import Desired, Phase, UpdateParams
from agent.repository import ModelRepository
from agent.store import deployments as store
from agent.store.deployments import Deployment
from agent.store.facts import FLOORS, read_fact, save_fact
from agent.store.ledger import CrashReport, EndedJob, Ledger, Outcome
from agent.tasks import FiguresBody
from agent.traffic import Traffic, find_traffic, write_traffic
from agent.window import BoxView, find_closed

log = logging.getLogger(__name__)

STAGED = "staged"
"""Key of a maintenance worker's result that is for the updater."""

_TURN_S = 0.25
_IDLE_S = 2.0
_RETRY_S = 1.0
_TOUCHED = (Phase.SHADOW, Phase.CANARY, Phase.ACTIVATING, Phase.PROBATION)
"""Phases in which the candidate has, or may have, something to do with the traffic."""

Call = Callable[[Callable[[Connection], Any]], Any]
ReadFigures = Callable[[], Sequence[FiguresBody]]


class Updater(threading.Thread):
    """Leads deployments to their end, one step at a time.

    Args:
        settings: of the box.
        clock: wall and boot time.
        ledger: of the update jobs.
        repository: of the models.
        call: runs something inside the writer's next transaction.
        read_figures: returns what the workers say of watched versions.
        view_box: says what the predicates of maintenance windows ask.
        submit: puts an update job into the ledger, for `desired`.
        cancel: cancels one.
    """

    def __init__(
        self,
        settings: Settings,
        clock: Clock,
        ledger: Ledger,
        repository: ModelRepository,
        call: Call,
        read_figures: ReadFigures,
        view_box: Callable[[], BoxView],
        submit: SubmitUpdate,
        cancel: Callable[[str], None],
    ) -> None:
        super().__init__(name="updater", daemon=True)
        self._clock = clock
        self._ledger = ledger
        self._repository = repository
        self._call = call
        self._read_figures = read_figures
        self._view_box = view_box
        self._root = settings.models_dir
        self._keep_versions = settings.updates.keep_versions
        self._probation_s = settings.updates.probation_s
        self.convergence = Convergence(
            clock, repository, call, ledger.find_open, submit, cancel, self._share_lasting
        )
        self._stopping = threading.Event()
        self._wake = threading.Event()
        self._books: dict[str, FigureBook] = {}
        self._starts: dict[str, dict[int, Tally]] = {}
        self._crashes: list[CrashReport] = []
        self._lock = threading.Lock()
        self._view: dict[str, Any] = {}
        self.turns = 0
        self.stamp = 0
        """Another number whenever what is reported has changed."""

    # --- inside the writer's transaction ------------------------------------------------------

    def begin(self, tx: Connection) -> None:
        """Take over what the last run left; a restart of the machine is no end of a probation."""
        boot = self._clock.boot_id()
        for one in store.list_deployments(tx):
            if one.boot_id != boot and one.phase in _TOUCHED:
                text = "the machine was restarted before the new version was committed"
                self._turn_back(tx, one, Reason("power_lost", text))
        self._refresh(tx)

    def take(
        self, tx: Connection, outcomes: Sequence[Outcome]
    ) -> tuple[list[Outcome], list[EndedJob]]:
        """Keep what a maintenance worker says of a staging; return the other outcomes."""
        rest: list[Outcome] = []
        ended: list[EndedJob] = []
        for outcome in outcomes:
            staged = outcome.result.get(STAGED) if outcome.result is not None else None
            if staged is not None and staged.get("floors") is not None:
                self._raise_floors(tx, staged["floors"])
            if staged is None:
                rest.append(outcome)
            elif outcome.state is JobState.SUCCEEDED:
                ended += self._deploy(tx, outcome, staged)
            else:
                self._refuse(tx, outcome, staged)
                rest.append(outcome._replace(result=None))
        return rest, ended

    def _raise_floors(self, tx: Connection, found: Mapping[str, Any]) -> None:
        """Keep what a worker has seen signed: nothing older is taken from now on.

        Committed with the outcome, and so before anything of the release is activated.
        """
        known = json.loads(read_fact(tx, FLOORS) or "{}")
        # New keys of the repository's own roles begin their versions anew; a worker says so.
        versions = dict(found["versions"])
        if known.get("versions", {}).get("root", 0) == versions.get("root", 0):
            for role, version in known.get("versions", {}).items():
                versions[role] = max(version, versions.get(role, 0))
        time_ms = max(int(found["time_ms"]), int(known.get("time_ms", 0)))
        save_fact(tx, FLOORS, encode({"time_ms": time_ms, "versions": versions}))

    def _deploy(
        self, tx: Connection, outcome: Outcome, staged: Mapping[str, Any]
    ) -> list[EndedJob]:
        row = self._ledger.hold(tx, outcome)
        if row is None:
            return []
        model, number = str(staged["model"]), int(staged["number"])
        reach("update.staged")
        params = staged["params"]
        one = Deployment(
            model=model,
            job_id=outcome.job_id,
            release=str(staged["release"]),
            number=number,
            digest=str(staged["digest"]),
            previous=None,
            older=None,
            phase=Phase.WAITING,
            params=UpdateParams.model_validate(params),
            boot_id=self._clock.boot_id(),
            since_ms=self._clock.wall_ms(),
            since_boot_ms=self._clock.boot_ms(),
            detail={"choice": staged.get("choice")},
        )
        why = self._find_obstacle(tx, one)
        if why is not None:
            return self._end(tx, one, JobState.FAILED, "failed", why)
        store.forgive(tx, one.digest)
        store.save_deployment(tx, one)
        self._refresh(tx)
        self._wake.set()
        return []

    def _find_obstacle(self, tx: Connection, one: Deployment) -> Reason | None:
        bad = store.read_bad(tx).get(one.digest)
        if bad is not None and not one.params.force:
            text = f"it failed on this box before: {bad['reason']}; send it with force to try again"
            return Reason("version_bad", text)
        other = store.find_deployment(tx, one.model)
        if other is not None and other.job_id != one.job_id:
            text = f"release {other.release} of {one.model} is on its way; wait for its end"
            return Reason("update_in_progress", text)
        return None

    def _refuse(self, tx: Connection, outcome: Outcome, staged: Mapping[str, Any]) -> None:
        """Mark a version that staging refused, unless its outcome comes too late to count."""
        if outcome.job_id not in self._ledger.find_open(tx, [outcome.job_id]):
            return
        model, release = str(staged["model"]), str(staged["release"])
        store.mark_bad(
            tx,
            digest=str(staged["digest"]),
            model=model,
            release=release,
            code=outcome.reason.code,
            reason=outcome.reason.message,
            since_ms=self._clock.wall_ms(),
        )
        self._save_state(tx, model, "failed", release, outcome.reason, staged)
        self._refresh(tx)

    def want(self, tx: Connection, desired: Desired) -> None:
        """Take note of what the console wants."""
        if self.convergence.want(tx, desired):
            self._refresh(tx)
            self._wake.set()

    def settle(self, crashes: Sequence[CrashReport]) -> None:
        """Take note, after a commit, of crashes that were told in it."""
        if crashes:
            with self._lock:
                self._crashes += crashes
            self._wake.set()

    # --- the thread -----------------------------------------------------------------------------

    def run(self) -> None:
        """Step until stopped; an error of one deployment is tried again and ends no other."""
        while not self._stopping.is_set():
            self.turns += 1
            wait_s = _IDLE_S
            try:
                if self._turn():
                    wait_s = _TURN_S
            except (TimeoutError, AgentError) as exc:
                log.warning("updates: %s; trying again", exc)
                wait_s = _RETRY_S
            except Exception:  # the supervisor loop boundary of style.md
                log.exception("internal_error in the updater; trying again")
                wait_s = _RETRY_S
            self._wake.wait(wait_s)
            self._wake.clear()

    def stop(self) -> None:
        """End the thread after the step it is in."""
        self._stopping.set()
        self._wake.set()
        if self.is_alive():
            self.join(10.0)

    def wake(self) -> None:
        """Look at once."""
        self._wake.set()

    def _turn(self) -> bool:
        """Take one step of each deployment; say whether there are any."""
        under_way = self._call(self._load)
        with self._lock:
            crashes, self._crashes = self._crashes, []
        for one, is_open in under_way:
            try:
                self._step(one, crashes, is_open=is_open)
            except AgentError as exc:
                log.warning("%s: %s; trying again", one.model, exc)
        busy = {one.model: one.job_id for one, _ in under_way}
        self.convergence.step(busy)
        self._books = {model: book for model, book in self._books.items() if model in busy}
        return bool(under_way)

    def _load(self, tx: Connection) -> list[tuple[Deployment, bool]]:
        found = store.list_deployments(tx)
        open_jobs = self._ledger.find_open(tx, [one.job_id for one in found]) if found else set()
        return [(one, one.job_id in open_jobs) for one in found]

    def _step(self, one: Deployment, crashes: Sequence[CrashReport], *, is_open: bool) -> None:
        is_leaving = one.phase in (Phase.ROLLING_BACK, Phase.COMMITTING)
        if not is_open and not is_leaving:
            self._leave(one, Reason("canceled", "the update job was cancelled"))
            return
        blamed = self._find_crash(one, crashes) if one.phase in _TOUCHED else None
        if blamed is not None:
            self._leave(one, blamed)
            return
        steps: dict[str, Callable[[Deployment], None]] = {
            Phase.WAITING: self._wait,
            Phase.SHADOW: self._watch_shadow,
            Phase.CANARY: self._watch_canary,
            Phase.ACTIVATING: self._activate,
            Phase.PROBATION: self._watch_probation,
            Phase.COMMITTING: self._commit,
            Phase.ROLLING_BACK: self._roll_back,
        }
        try:
            steps[one.phase](one)
        except ModelNotFoundError as exc:
            self._abandon(one, Reason("changed_locally", str(exc)))

    def _abandon(self, one: Deployment, reason: Reason) -> None:
        """End the update of a model that somebody has removed meanwhile."""

        def finish(tx: Connection) -> Ended:
            store.delete_deployment(tx, one.model)
            return Ended(self._end(tx, one, JobState.FAILED, "failed", reason))

        self._call(finish)
        self._forget(one.model)

    def _find_crash(self, one: Deployment, crashes: Sequence[CrashReport]) -> Reason | None:
        """Return why a crash is the candidate's, or nobody else's to be."""
        for crash in crashes:
            is_mine = (crash.model, crash.version) == (one.model, str(one.number))
            if crash.signal == "hang" and is_mine:
                limit_s = one.params.probation.hang_s
                text = f"a run of the new version lasted longer than {limit_s:g} s"
                return Reason("probation_hang", text)
            if is_mine or not crash.model:
                text = f"the serving process crashed ({crash.signal}) while it had the new version"
                return Reason("probation_crash", text)
        return None

    # --- phases -----------------------------------------------------------------------------

    def _wait(self, one: Deployment) -> None:
        window = one.params.window
        if window is not None:
            now = datetime.fromtimestamp(self._clock.wall_ms() / 1000)
            closed = find_closed(window, now, self._view_box())
            if closed is not None:
                self._note_wait(one, closed.why)
                return
        active, older = self._read_links(one.model)
        one = replace(one, previous=active if active != one.number else None, older=older)
        if active == one.number:
            # It serves already: by hand, or by an update whose end was lost with its ledger.
            self._enter(one, Phase.COMMITTING)
        elif active is None:
            # There is nothing to compare with, and nobody to fall back on.
            self._enter(one, Phase.ACTIVATING)
        elif one.params.rollout.shadow_s > 0:
            self._enter(one, Phase.SHADOW)
        elif one.params.rollout.canary:
            self._enter(one, Phase.CANARY)
        else:
            self._enter(one, Phase.ACTIVATING)

    def _note_wait(self, one: Deployment, why: str) -> None:
        if one.detail.get("waits") == why:
            return

        def note(tx: Connection) -> None:
            store.save_deployment(tx, replace(one, detail={**one.detail, "waits": why}))
            self._refresh(tx)

        self._call(note)

    def _watch_shadow(self, one: Deployment) -> None:
        rollout = one.params.rollout
        self._share(one, shadow=one.number, shadow_percent=rollout.shadow_percent)
        if self._object(one):
            return
        if self._lasted_s(one) >= rollout.shadow_s:
            self._enter(one, Phase.CANARY if rollout.canary else Phase.ACTIVATING)

    def _watch_canary(self, one: Deployment) -> None:
        shares = one.params.rollout.canary
        self._share(one, shares={one.number: shares[one.step]})
        if self._object(one):
            return
        # The canary's steps and the time as the active version share the probation.
        part_s = self._get_duration_s(one) / (len(shares) + 1)
        if self._lasted_s(one) < part_s:
            return
        if one.step + 1 < len(shares):
            self._enter(replace(one, step=one.step + 1), Phase.CANARY)
        else:
            self._enter(one, Phase.ACTIVATING)

    def _activate(self, one: Deployment) -> None:
        reach("update.activating")
        self._share(one, fallback=one.previous)
        reach("update.shared")
        try:
            self._repository.activate(one.model, str(one.number))
        except (DigestMismatchError, ManifestError, ModelError) as exc:
            if exc.code == "repository_busy":
                raise
            self._leave(one, Reason(exc.code, str(exc)))
            return
        reach("update.switched")
        self._enter(one, Phase.PROBATION)

    def _watch_probation(self, one: Deployment) -> None:
        self._share(one, fallback=one.previous)
        active, _ = self._read_links(one.model)
        if active != one.number:
            text = f"version {active} was made the active one by hand"
            self._leave(one, Reason("changed_locally", text))
            return
        if self._object(one):
            return
        canary = one.params.rollout.canary
        rules = one.params.probation
        part_s = self._get_duration_s(one) / (len(canary) + 1)
        rules = rules.model_copy(update={"duration_s": part_s})
        if is_enough(rules, self._lasted_s(one), self._tally(one)[0], self._tally_meanwhile(one)):
            self._enter(one, Phase.COMMITTING)

    def _commit(self, one: Deployment) -> None:
        reach("update.committing")
        write_traffic(self._root / one.model, None)
        reach("update.unshared")

        def finish(tx: Connection) -> Ended:
            store.delete_deployment(tx, one.model)
            reason = Reason("committed", "the new version serves, its probation is over")
            return Ended(self._end(tx, one, JobState.SUCCEEDED, "in_sync", reason))

        self._call(finish)
        self._forget(one.model)
        reach("update.committed")
        self._prune(one.model)
        log.info("%s: release %s is committed", one.model, one.release)

    def _roll_back(self, one: Deployment) -> None:
        reason = Reason(one.detail["code"], one.detail["message"])
        reach("update.rolling_back")
        active, _ = self._read_links(one.model)
        if active == one.number and reason.code != "changed_locally":
            self._restore(one)
        reach("update.restored")
        write_traffic(self._root / one.model, None)
        reach("update.reset")

        def finish(tx: Connection) -> Ended:
            store.delete_deployment(tx, one.model)
            if is_guilty(reason):
                store.mark_bad(
                    tx,
                    digest=one.digest,
                    model=one.model,
                    release=one.release,
                    code=reason.code,
                    reason=reason.message,
                    since_ms=self._clock.wall_ms(),
                )
            return Ended(self._end(tx, one, JobState.FAILED, "rolled_back", reason))

        self._call(finish)
        self._forget(one.model)
        reach("update.rolled_back")
        log.warning("%s: release %s is rolled back: %s", one.model, one.release, reason.message)

    def _prune(self, model: str) -> None:
        """Remove versions that nobody goes back to."""
        versions = self._repository.list_versions(model)
        kept = {item.number for item in versions if item.is_active or item.is_previous}
        for item in reversed(versions):
            if len(kept) < self._keep_versions:
                kept.add(item.number)
        for item in versions:
            if item.number not in kept:
                log.info("%s: version %d is removed, it is too old", model, item.number)
                self._repository.remove(model, str(item.number))

    def _restore(self, one: Deployment) -> None:
        try:
            self._repository.restore(one.model, one.previous, one.older)
        except VersionNotFoundError as exc:
            # Somebody has removed it by hand: what serves badly is better than nothing.
            log.error("%s cannot go back: %s", one.model, exc)  # noqa: TRY400

    # --- what the phases share -----------------------------------------------------------------

    def _share(self, one: Deployment, **shares: Any) -> None:
        """Let the workers know how the model's traffic is shared just now."""
        previous = () if one.previous is None else (one.previous,)
        traffic = Traffic(
            keep=(*previous, one.number),
            watch=(*previous, one.number),
            hang_s=one.params.probation.hang_s,
            **shares,
        )
        folder = self._root / one.model
        if find_traffic(folder) != traffic:
            write_traffic(folder, traffic)

    def _share_lasting(self, model: str, traffic: Traffic | None) -> None:
        folder = self._root / model
        if find_traffic(folder) != traffic and folder.is_dir():
            write_traffic(folder, traffic)

    def _object(self, one: Deployment) -> bool:
        """Roll a candidate back that must not go on; say whether it was."""
        candidate, previous = self._tally(one)
        growth_mb = self._books[one.model].find_growth_mb()
        why = find_objection(one.params.probation, candidate, previous, growth_mb)
        if why is not None:
            self._leave(one, why)
        return why is not None

    def _tally(self, one: Deployment) -> tuple[Tally, Tally]:
        """Return what the candidate has done in this phase, and all that the previous one has."""
        book = self._books.setdefault(one.model, FigureBook())
        book.add(self._read_figures())
        now = book.tally(one.model, one.number)
        start = self._starts.setdefault(one.model, {}).setdefault(one.number, now)
        previous = Tally() if one.previous is None else book.tally(one.model, one.previous)
        if one.previous is not None:
            self._starts[one.model].setdefault(one.previous, previous)
        return subtract(now, start), previous

    def _tally_meanwhile(self, one: Deployment) -> Tally:
        """Return what the previous version has done in this phase."""
        if one.previous is None:
            return Tally()
        now = self._books[one.model].tally(one.model, one.previous)
        return subtract(now, self._starts[one.model].get(one.previous, now))

    def _get_duration_s(self, one: Deployment) -> float:
        wanted = one.params.probation.duration_s
        return self._probation_s if wanted is None else wanted

    def _lasted_s(self, one: Deployment) -> float:
        if one.boot_id != self._clock.boot_id():
            return 0.0
        return (self._clock.boot_ms() - one.since_boot_ms) / 1000

    def _read_links(self, model: str) -> tuple[int | None, int | None]:
        versions = self._repository.list_versions(model)
        active = next((item.number for item in versions if item.is_active), None)
        previous = next((item.number for item in versions if item.is_previous), None)
        return active, previous

    def _enter(self, one: Deployment, phase: Phase) -> None:
        """Commit the next phase; what it does comes after."""
        tallies = self._tally(one) if one.phase in _TOUCHED else None
        detail = {k: v for k, v in one.detail.items() if k != "waits"}
        if tallies is not None:
            seen = {"candidate": tallies[0].to_json(), "previous": tallies[1].to_json()}
            detail[f"{one.phase}_{one.step}" if one.phase == Phase.CANARY else one.phase] = seen
        entered = replace(
            one,
            phase=phase,
            boot_id=self._clock.boot_id(),
            since_ms=self._clock.wall_ms(),
            since_boot_ms=self._clock.boot_ms(),
            detail=detail,
        )

        def save(tx: Connection) -> None:
            store.save_deployment(tx, entered)
            self._refresh(tx)

        self._call(save)
        self._starts.pop(one.model, None)
        self._wake.set()

    def _leave(self, one: Deployment, reason: Reason) -> None:
        log.warning("%s: release %s must go back: %s", one.model, one.release, reason.message)

        def save(tx: Connection) -> None:
            self._turn_back(tx, one, reason)
            self._refresh(tx)

        self._call(save)
        self._wake.set()

    def _turn_back(self, tx: Connection, one: Deployment, reason: Reason) -> None:
        detail = {
            **one.detail,
            "code": reason.code,
            "message": reason.message,
            "failed_in": one.phase,
        }
        store.save_deployment(tx, replace(one, phase=Phase.ROLLING_BACK, detail=detail))

    def _end(
        self, tx: Connection, one: Deployment, state: JobState, status: str, reason: Reason
    ) -> list[EndedJob]:
        """End the update job, and keep what is reported of the model."""
        result = None
        if state is JobState.SUCCEEDED:
            result = {
                "model": one.model,
                "release": one.release,
                "version": one.number,
                "update": dict(one.detail),
            }
        ended = self._ledger.finish(tx, one.job_id, state, reason, result)
        self._save_state(tx, one.model, status, one.release, reason, one.detail)
        event: dict[str, object] = {
            "code": reason.code,
            "message": reason.message,
            "model": one.model,
            "release": one.release,
            "status": status,
        }
        self._ledger.add_event(tx, "model_updated", event)
        self._refresh(tx)
        return ended

    def _save_state(
        self,
        tx: Connection,
        model: str,
        status: str,
        release: str,
        reason: Reason,
        detail: Mapping[str, Any],
    ) -> None:
        store.save_state(
            tx,
            model,
            status=status,
            release=release,
            code=reason.code,
            message=reason.message,
            at_ms=self._clock.wall_ms(),
            detail=encode(dict(detail)),
        )

    def _forget(self, model: str) -> None:
        self._books.pop(model, None)
        self._starts.pop(model, None)

    # --- what is reported -----------------------------------------------------------------------

    def _refresh(self, tx: Connection) -> None:
        """Read again what is reported; inside the transaction that has changed it."""
        self._view = {
            "deployments": {one.model: one for one in store.list_deployments(tx)},
            "states": store.read_states(tx),
            "bad": store.read_bad(tx),
            "desired": self.convergence.read(tx),
        }
        self.stamp += 1

    def describe_followed(self) -> dict[str, Any]:
        """Return which desired document is followed, for a sync."""
        desired = self._view.get("desired")
        if desired is None:
            return {"epoch": None, "desired_version": None}
        return {"epoch": desired.epoch, "desired_version": desired.version}

    def describe(self, models: dict[str, Any]) -> dict[str, Any]:
        """Return the body of `reported`: the models' versions with how their updates stand."""
        view = self._view
        found = {name: dict(entry) for name, entry in models.items()}
        for name, state in view.get("states", {}).items():
            entry = found.setdefault(name, {"active": None, "previous": None, "versions": []})
            entry["status"] = state["status"]
            entry["reason"] = {"code": state["code"], "message": state["message"]}
            entry["last"] = {"release": state["release"], **_shorten(state["detail"])}
        for name, one in view.get("deployments", {}).items():
            entry = found.setdefault(name, {"active": None, "previous": None, "versions": []})
            entry["status"] = "deferred" if "waits" in one.detail else "applying"
            why = one.detail.get("waits") or one.detail.get("message", "")
            entry["reason"] = {"code": one.phase, "message": why}
            entry["candidate"] = {
                "version": one.number,
                "release": one.release,
                "state": one.phase,
                "job_id": one.job_id,
            }
        for digest, bad in view.get("bad", {}).items():
            if bad["model"] in found:
                found[bad["model"]].setdefault("bad", []).append(
                    {"digest": digest, "release": bad["release"], "reason": bad["reason"]}
                )
        return self.convergence.describe(found, view.get("desired"))


def is_guilty(reason: Reason) -> bool:
    """Say whether it was the version's fault that it had to go back."""
    return reason.code not in ("canceled", "changed_locally", "power_lost", "repository_busy")


def _shorten(detail: Mapping[str, Any]) -> dict[str, Any]:
    kept = {k: v for k, v in detail.items() if k in ("choice", "probation", "failed_in")}
    copied: dict[str, Any] = json.loads(json.dumps(kept))
    return copied
