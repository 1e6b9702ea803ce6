"""Starts a command of `edgeward` with one of three bugs planted in its process.

    python -m tests.fault.planted BUG agent

Each bug is what a careless change could do, at one place:

- `puback_first`: a command is acknowledged when it comes in, not after its commit;
- `old_attempt`: an outcome counts whatever attempt it is of;
- `deleted_at_publish`: a record leaves the outbox when it is sent, not when it has arrived.

The first comes with a slow disk, so that there is time between the two; `slow_disk` and `none`
have no bug and serve as controls.
"""

import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from sqlalchemy import Connection

from agent.daemon.intake import Intake, IntakeResult
from agent.daemon.messages import Received
from agent.daemon.mqtt import MqttSession
from agent.daemon.reporter import Reporter, Selected
from agent.store import outbox
from agent.store.ledger import EndedJob, Ledger, Outcome

_SLOW_COMMIT_S = 0.15


def slow_down_disk() -> None:
    """Let each transaction that takes commands in last as long as on a busy SD card."""
    original = Intake.handle

    def handle(
        self: Intake, tx: Connection, received: Sequence[Received], *rest: Any, **options: Any
    ) -> IntakeResult:
        if received:
            time.sleep(_SLOW_COMMIT_S)
        return original(self, tx, received, *rest, **options)

    Intake.handle = handle  # type: ignore[method-assign]


def plant_puback_first() -> None:
    """Acknowledge each message in paho's thread, before anybody has looked at it."""
    slow_down_disk()
    original = MqttSession._on_message

    def on_message(self: MqttSession, client: Any, conn: int, message: Any) -> None:
        client.ack(message.mid, message.qos)
        original(self, client, conn, message)

    MqttSession._on_message = on_message  # type: ignore[method-assign,assignment]


def plant_old_attempt() -> None:
    """Give every outcome the attempt that is current, so that no fence stops it."""
    original = Ledger.record_outcomes

    def record_outcomes(
        self: Ledger, tx: Connection, outcomes: Sequence[Outcome], *rest: Any, **options: Any
    ) -> list[EndedJob]:
        known = self.find_jobs(tx, [outcome.job_id for outcome in outcomes])
        current = [
            outcome._replace(attempt=known[outcome.job_id]["attempt"])
            for outcome in outcomes
            if outcome.job_id in known
        ]
        return original(self, tx, current, *rest, **options)

    Ledger.record_outcomes = record_outcomes  # type: ignore[method-assign]


def plant_deleted_at_publish() -> None:
    """Remove records in the transaction that numbers them for their publish."""
    original = Reporter.select

    def select(self: Reporter, tx: Connection, waiting_jobs: int, freed: int) -> Selected:
        selected = original(self, tx, waiting_jobs, freed)
        seqs = [record.seq for record in selected.records if record.seq is not None]
        outbox.delete_acknowledged(tx, seqs)
        return selected

    Reporter.select = select  # type: ignore[method-assign]


BUGS: dict[str, Callable[[], None]] = {
    "none": lambda: None,
    "slow_disk": slow_down_disk,
    "puback_first": plant_puback_first,
    "old_attempt": plant_old_attempt,
    "deleted_at_publish": plant_deleted_at_publish,
}


def main() -> None:
    """Plant the bug that the first word names, and run the rest as `edgeward` would."""
    from console.entry import main as run_edgeward

    bug = sys.argv.pop(1)
    BUGS[bug]()
    run_edgeward()


if __name__ == "__main__":
    main()
