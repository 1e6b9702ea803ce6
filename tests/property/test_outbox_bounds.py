"""No loss is silent: what arrives and what gap records name is every number, once asked for all."""

import json
import tempfile
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from agent.store import bounds, outbox
from agent.store.bounds import OutboxBounds
from agent.store.outbox import Rank, Record
from agent.store.records import build_event, build_progress, build_result, build_telemetry
from tests.harness.ledger import FAR_FUTURE_MS, Store

DAY_MS = 86_400_000
LIMITS = OutboxBounds(result_bytes=2000, result_days=5, events=10, telemetry=16)
SLACK = 300
"""Gap records that are not looked at yet."""


class Outbox(RuleBasedStateMachine):
    """A device that reports, a line that loses, a console that counts."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.store = Store(Path(self.folder.name) / "ledger.db", synchronous="OFF")
        self.arrived: set[int] = set()
        self.named: set[int] = set()
        self.added = 0

    def teardown(self) -> None:
        try:
            self.replay_all()
            highest = self.store.run(lambda tx: outbox.read_counter(tx, "seq"))
            assert self.arrived | self.named == set(range(1, highest + 1))
        finally:
            self.store.close()
            self.folder.cleanup()

    def replay_all(self) -> None:
        self.publish(10_000, loses=0)
        sent = self.store.run(lambda tx: outbox.find_sent(tx, 0, 10**9, 10**6))
        for record in sent:
            self.receive(record)

    def receive(self, record: Record) -> None:
        assert record.seq is not None
        self.arrived.add(record.seq)
        if record.type == "event.gap":
            body = json.loads(record.body)
            numbers = range(body["from_seq"], body["to_seq"] + 1)
            assert body["count"] == len(numbers) > 0
            self.named |= set(numbers)

    def add(self, rows: list[dict[str, Any]]) -> None:
        self.added += len(rows)
        self.store.run(lambda tx: outbox.add_records(tx, rows))

    @rule(count=st.integers(1, 20), size=st.integers(1, 400), keep=st.booleans())
    def add_results(self, count: int, size: int, keep: bool) -> None:
        body = json.dumps("x" * size)
        row = build_result(self.store.topics, "job", body, self.store.clock.wall, keep=keep)
        self.add([row] * count)

    @rule(count=st.integers(1, 30))
    def add_events(self, count: int) -> None:
        self.add([build_event(self.store.topics, "e", {}, self.store.clock.wall)] * count)

    @rule(count=st.integers(1, 40))
    def add_heartbeats(self, count: int) -> None:
        self.add([build_telemetry(self.store.topics, "{}", self.store.clock.wall)] * count)

    @rule(job=st.integers(1, 3))
    def add_progress(self, job: int) -> None:
        name = f"job-{job}"
        row = build_progress(self.store.topics, name, {"job_id": name}, self.store.clock.wall)
        self.store.run(lambda tx: outbox.add_progress(tx, [row]))

    @rule()
    def add_state(self) -> None:
        self.store.accept()

    @rule(limit=st.integers(1, 40), loses=st.integers(0, 3))
    def publish(self, limit: int, loses: int) -> None:
        """Publish; the line loses the records whose number divides."""
        records = self.store.run(lambda tx: outbox.take_unsent(tx, limit, FAR_FUTURE_MS))
        for record in records:
            if not loses or record.seq % (loses + 1):
                self.receive(record)

    @rule()
    def acknowledge(self) -> None:
        safe = self.arrived | self.named
        upto = 0
        while upto + 1 in safe:
            upto += 1
        self.store.run(lambda tx: outbox.delete_upto(tx, upto))

    @rule(days=st.integers(0, 4))
    def live_on(self, days: int) -> None:
        self.store.clock.advance(days * DAY_MS)

    @rule()
    def refuse_a_result(self) -> None:
        self.store.run(
            lambda tx: bounds.drop_new(tx, self.store.topics, [{}], self.store.clock.wall)
        )

    @rule()
    def enforce(self) -> None:
        now_ms = self.store.clock.wall
        # More at once than is thinned in one go takes a few.
        for _ in range(8):
            self.store.run(lambda tx: bounds.enforce(tx, self.store.topics, LIMITS, now_ms))
        sizes = self.store.run(outbox.measure_classes)
        assert sizes.get(Rank.TELEMETRY, (0, 0))[0] <= LIMITS.telemetry
        assert sizes.get(Rank.EVENT, (0, 0))[0] <= LIMITS.events + SLACK

    @invariant()
    def numbers_on_the_wire_are_never_given_twice(self) -> None:
        sent = self.store.run(lambda tx: outbox.find_sent(tx, 0, 10**9, 10**6))
        assert len({record.seq for record in sent}) == len(sent)


TestOutbox = Outbox.TestCase
TestOutbox.settings = settings(
    max_examples=60,
    stateful_step_count=40,
    phases=(Phase.generate,),
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
