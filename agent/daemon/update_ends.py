"""How an update ends: its job, what is reported of the model, the mark on a version that failed.

All of it in the caller's transaction.
"""

from collections.abc import Mapping
from typing import Any

from sqlalchemy import Connection

from agent.clock import Clock
from agent.commands import encode
from agent.jobs import JobState, Reason
from agent.store import deployments as store
from agent.store.deployments import Deployment
from agent.store.ledger import EndedJob, Ledger


class UpdateEnds:
    """Writes ends.

    Args:
        clock: wall time.
        ledger: of the update jobs.
    """

    def __init__(self, clock: Clock, ledger: Ledger) -> None:
        self._clock = clock
        self._ledger = ledger

    def end(
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
        self.save_state(tx, one.model, status, one.release, reason, one.detail)
        event: dict[str, object] = {
            "code": reason.code,
            "message": reason.message,
            "model": one.model,
            "release": one.release,
            "status": status,
        }
        self._ledger.add_event(tx, "model_updated", event)
        return ended

    def save_state(
        self,
        tx: Connection,
        model: str,
        status: str,
        release: str,
        reason: Reason,
        detail: Mapping[str, Any],
    ) -> None:
        """Keep how a model's last update ended."""
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

    def mark_bad(
        self, tx: Connection, digest: str, model: str, release: str, reason: Reason
    ) -> None:
        """Note that a version failed on this box."""
        store.mark_bad(
            tx,
            digest=digest,
            model=model,
            release=release,
            code=reason.code,
            reason=reason.message,
            since_ms=self._clock.wall_ms(),
        )
