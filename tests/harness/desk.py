"""Intake and ledger on a real file, fed with messages as the MQTT session hands them over."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sqlalchemy import text

from agent.config import Settings
from agent.daemon.intake import Intake, IntakeResult
from agent.daemon.messages import Received
from agent.sections import LimitSettings
from agent.store.retention import Retention
from tests.harness.clocks import FakeClock
from tests.harness.ledger import Store

MODEL = "tiny"
IDENTITY = "01M828X3D867SBDXASF57QTTZ1"


def answer_nothing(_name: str, _message: Received, _broadcast: bool) -> Callable[[], None]:
    return lambda: None


@dataclass
class Desk:
    """A device's intake without the rest of the device."""

    folder: Path
    clock: FakeClock = field(default_factory=FakeClock)
    limits: LimitSettings = field(default_factory=LimitSettings)
    keep_ends_days: int = 30
    synchronous: str = "FULL"

    def __post_init__(self) -> None:
        self.store = Store(self.folder / "ledger.db", self.clock, synchronous=self.synchronous)
        self.open_jobs = 0
        self._mid = 0
        self.restart()

    def restart(self) -> None:
        """Begin again with what is on disk, as a new process would."""
        self.topics = self.store.topics
        self.retention = Retention(self.clock, self.keep_ends_days, 2)
        self.store.run(self.retention.begin)
        settings = Settings(device_id="dev", data_dir=self.folder, limits=self.limits)
        self.intake = Intake(
            settings,
            self.topics,
            self.store.ledger,
            self.retention,
            self.clock,
            lambda name: name == MODEL,
            lambda _model, _version: None,
            answer_nothing,
        )
        self.intake.begin(IDENTITY)

    def message(self, topic: str, payload: bytes, expiry_s: int | None = None) -> Received:
        """Return a message with QoS 1 and a number of its own, as the broker would send it."""
        self._mid += 1
        return Received(1, self._mid, topic, payload, expiry_s)

    def hear(self, *messages: Received) -> IntakeResult:
        """Take in messages in one turn."""
        result: IntakeResult = self.store.run(
            lambda tx: self.intake.handle(tx, messages, (), self.open_jobs)
        )
        self.open_jobs += result.accepted - len(result.ended)
        return result

    def publish_all(self) -> list[tuple[str, dict[str, Any]]]:
        """Number everything that waits, as if it were published; return types and bodies."""
        records = self.store.take(10_000)
        return [(record.type, json.loads(record.body)) for record in records]

    def history(self, job_id: str) -> list[tuple[str, str | None]]:
        """Return a job's states with their reasons; their numbers must count from 1."""
        query = text(
            "SELECT rev, state, reason_code FROM transitions WHERE job_id = :id ORDER BY rev"
        )
        rows = self.store.run(lambda tx: tx.execute(query, {"id": job_id}).all())
        assert [row[0] for row in rows] == list(range(1, len(rows) + 1))
        return [(row[1], row[2]) for row in rows]

    def close(self) -> None:
        self.store.close()
