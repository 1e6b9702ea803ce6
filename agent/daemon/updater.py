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

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import datetime
from typing import Any

from sqlalchemy import Connection

from agent.choice import compute_digest, sweep_choices
from agent.clock import Clock
from agent.config import Settings
from agent.daemon.convergence import Convergence, SubmitUpdate
from agent.daemon.gate import FigureBook, Tally, find_objection, is_enough, subtract
from agent.daemon.messages import Ended
from agent.daemon.model_report import ModelReport
from agent.daemon.remeasuring import Remeasuring
from agent.daemon.staged import StagedIntake
from agent.daemon.update_ends import UpdateEnds
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
from agent.lifecycle import Desired, Phase
from agent.repository import ModelRepository
from agent.store import deployments as store
from agent.store.deployments import Deployment
from agent.store.ledger import CrashReport, EndedJob, Ledger, Outcome
from agent.tasks import STAGED, FiguresBody
from agent.traffic import Traffic, find_traffic, write_traffic
from agent.window import BoxView, Window, find_closed

log = logging.getLogger(__name__)

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
        self._choices = settings.choices_dir
        self._keep_versions = settings.updates.keep_versions
        self._probation_s = settings.updates.probation_s
        self._ends = UpdateEnds(clock, ledger)
        self._staged = StagedIntake(clock, ledger, self._ends, self._find_active)
        self._convergence = Convergence(
            clock,
            repository,
            call,
            ledger.find_open,
            submit,
            cancel,
            self._share_lasting,
        )
        self._remeasuring = Remeasuring(settings, repository, submit)
        self.report = ModelReport(self._convergence)
        self._stopping = threading.Event()
        self._wake = threading.Event()
        self._books: dict[str, FigureBook] = {}
        self._starts: dict[str, dict[int, Tally]] = {}
        self.turns = 0

    # --- inside the writer's transaction ------------------------------------------------------

    def begin(self, tx: Connection) -> None:
        """Take over what the last run left; a restart of the machine is no end of a probation."""
        boot = self._clock.boot_id()
        for one in store.list_deployments(tx):
            if one.boot_id != boot and one.phase in _TOUCHED:
                text = "the machine was restarted before the new version was committed"
                _turn_back(tx, one, Reason("power_lost", text))
        self.report.refresh(tx)

    def take(
        self, tx: Connection, outcomes: Sequence[Outcome]
    ) -> tuple[list[Outcome], list[EndedJob]]:
        """Keep what a maintenance worker says of a staging; return the other outcomes."""
        rest, ended = self._staged.take(tx, outcomes)
        if len(rest) < len(outcomes) or any(STAGED in (one.result or {}) for one in outcomes):
            self.report.refresh(tx)
            self._wake.set()
        return rest, ended

    def want(self, tx: Connection, desired: Desired) -> None:
        """Take note of what the console wants."""
        if self._convergence.want(tx, desired):
            self.report.refresh(tx)
            self._wake.set()

    def note_crashes(self, tx: Connection, crashes: Sequence[CrashReport]) -> None:
        """Turn back whatever a crash is blamed on, in the transaction that takes note of it.

        So an agent that is killed next still knows.
        """
        if not crashes:
            return
        for one in store.list_deployments(tx):
            blamed = _find_crash(one, crashes) if one.phase in _TOUCHED else None
            if blamed is not None:
                _turn_back(tx, one, blamed)
                self._wake.set()
        self.report.refresh(tx)

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

    def _turn(self) -> bool:
        """Take one step of each deployment; say whether there are any."""
        under_way = self._call(self._load)
        for one, is_open in under_way:
            try:
                self._step(one, is_open=is_open)
            except AgentError as exc:
                log.warning("%s: %s; trying again", one.model, exc)
        busy = {one.model: one.job_id for one, _ in under_way}
        self._convergence.step(busy)
        self._remeasuring.step(busy)
        self._books = {model: book for model, book in self._books.items() if model in busy}
        return bool(under_way)

    def _load(self, tx: Connection) -> list[tuple[Deployment, bool]]:
        found = store.list_deployments(tx)
        open_jobs = self._ledger.find_open(tx, [one.job_id for one in found]) if found else set()
        return [(one, one.job_id in open_jobs) for one in found]

    def _step(self, one: Deployment, *, is_open: bool) -> None:
        is_leaving = one.phase in (Phase.ROLLING_BACK, Phase.COMMITTING)
        if not is_open and not is_leaving:
            self._leave(one, Reason("canceled", "the update job was cancelled"))
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

    # --- phases -----------------------------------------------------------------------------

    def _wait(self, one: Deployment) -> None:
        now = datetime.fromtimestamp(self._clock.wall_ms() / 1000)
        # A box that is not to be disturbed is left alone at any time.
        closed = find_closed(one.params.window or Window(), now, self._view_box())
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

        self._replace(one, replace(one, detail={**one.detail, "waits": why}))

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
                self._ends.mark_bad(tx, one.digest, one.model, one.release, reason)
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
        self._sweep_choices()

    def _sweep_choices(self) -> None:
        folders = [
            item.folder
            for name in self._repository.list_models()
            for item in self._repository.list_versions(name)
        ]
        try:
            sweep_choices(self._choices, {compute_digest(folder) for folder in folders})
        except OSError as exc:
            log.warning("records of choices are not swept: %s", exc)

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

    def _find_active(self, model: str) -> int | None:
        try:
            return self._read_links(model)[0]
        except ModelError:
            # Removed meanwhile.
            return None

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
        self._replace(one, entered)
        self._starts.pop(one.model, None)
        self._wake.set()

    def _leave(self, one: Deployment, reason: Reason) -> None:
        log.warning("%s: release %s must go back: %s", one.model, one.release, reason.message)
        self._replace(one, _build_turned_back(one, reason))
        self._wake.set()

    def _replace(self, known: Deployment, one: Deployment) -> None:
        """Commit a deployment as it is to be, unless a crash has changed it meanwhile."""

        def save(tx: Connection) -> None:
            found = store.find_deployment(tx, known.model)
            if found is None or (found.job_id, found.phase) != (known.job_id, known.phase):
                return
            store.save_deployment(tx, one)
            self.report.refresh(tx)

        self._call(save)

    def _end(
        self, tx: Connection, one: Deployment, state: JobState, status: str, reason: Reason
    ) -> list[EndedJob]:
        ended = self._ends.end(tx, one, state, status, reason)
        self.report.refresh(tx)
        return ended

    def _forget(self, model: str) -> None:
        self._books.pop(model, None)
        self._starts.pop(model, None)


def is_guilty(reason: Reason) -> bool:
    """Say whether it was the version's fault that it had to go back."""
    return reason.code not in ("canceled", "changed_locally", "power_lost", "repository_busy")


def _find_crash(one: Deployment, crashes: Sequence[CrashReport]) -> Reason | None:
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


def _turn_back(tx: Connection, one: Deployment, reason: Reason) -> None:
    store.save_deployment(tx, _build_turned_back(one, reason))


def _build_turned_back(one: Deployment, reason: Reason) -> Deployment:
    detail = {
        **one.detail,
        "code": reason.code,
        "message": reason.message,
        "failed_in": one.phase,
    }
    return replace(one, phase=Phase.ROLLING_BACK, detail=detail)
