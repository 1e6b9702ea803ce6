"""What a maintenance worker says of a staging: a deployment begins, or a version is refused.

Owns the way from such an outcome into the ledger, in the transaction that commits it: the versions
that were seen signed, the deployment, the mark on what failed.

Invariants: an outcome that comes too late changes nothing; what was seen signed is kept before
anything of the release is activated; the version that serves is never marked bad for what staging
finds of it again: it is reported.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sqlalchemy import Connection

from agent.clock import Clock
from agent.commands import encode
from agent.daemon.update_ends import UpdateEnds
from agent.faults import reach
from agent.jobs import JobState, Reason
from agent.lifecycle import Phase, UpdateParams
from agent.store import deployments as store
from agent.store.deployments import Deployment
from agent.store.facts import FLOORS, read_fact, save_fact
from agent.store.ledger import EndedJob, Ledger, Outcome
from agent.tasks import STAGED


class StagedIntake:
    """Takes outcomes of stagings in.

    Args:
        clock: wall and boot time.
        ledger: of the update jobs.
        ends: ends update jobs.
        find_active: returns the number of a model's active version.
    """

    def __init__(
        self,
        clock: Clock,
        ledger: Ledger,
        ends: UpdateEnds,
        find_active: Callable[[str], int | None],
    ) -> None:
        self._clock = clock
        self._ledger = ledger
        self._ends = ends
        self._find_active = find_active

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
            return self._ends.end(tx, one, JobState.FAILED, "failed", why)
        store.forgive(tx, one.digest)
        store.save_deployment(tx, one)
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
        if self._find_active(model) != staged["number"]:
            self._ends.mark_bad(tx, str(staged["digest"]), model, release, outcome.reason)
        self._ends.save_state(tx, model, "failed", release, outcome.reason, staged)

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
