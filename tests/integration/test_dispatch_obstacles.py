"""What is not dispatched: damaged bodies, closed windows; and what happens to it instead."""

import os
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from agent.commands import hash_text
from agent.daemon.dispatch import Dispatcher
from agent.sections import QueueSettings
from agent.window import BoxView
from tests.harness.ledger import Store

BODY = '{"handler":"infer","model":"digits"}'


class Bench:
    """A dispatcher that is never started, on a real ledger."""

    def __init__(self, folder: Path) -> None:
        self.store = Store(folder / "ledger.db")
        self.box = BoxView()
        self.dispatcher = Dispatcher(
            "dev",
            "redis+socket:///nowhere.sock",
            QueueSettings(),
            self.store.ledger,
            self.store.clock,
            lambda _message: None,
            view_box=lambda: self.box,
        )
        self.dispatcher.broker.reachable = True

    def accept(self, options: str | None = None) -> str:
        return self.store.accept(body=BODY, body_hash=hash_text(BODY), options=options)

    def select(self) -> int:
        """Take a turn; return how many tasks were made."""
        return len(self.store.run(self.dispatcher.select).tasks)

    def wait_for_start(self, limit_s: int) -> datetime:
        """Let time pass, a look every 10 s, until the job is dispatched; return when."""
        for _ in range(limit_s // 10):
            if self.select():
                return datetime.fromtimestamp(self.store.clock.wall / 1000, UTC)
            self.store.clock.advance(10_000)
        pytest.fail(f"not dispatched within {limit_s} s")


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    bench = Bench(tmp_path)
    yield bench
    bench.store.close()


@pytest.fixture
def berlin(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    before = os.environ.get("TZ")
    monkeypatch.setenv("TZ", "Europe/Berlin")
    time.tzset()
    yield
    if before is None:
        monkeypatch.delenv("TZ")
    else:
        monkeypatch.setenv("TZ", before)
    time.tzset()


@pytest.mark.parametrize("bit", [0, 5, 7])
@pytest.mark.parametrize("at", [0, 12, len(BODY) - 1])
def test_job_with_one_flipped_bit_fails_and_its_neighbours_run(
    bench: Bench, bit: int, at: int
) -> None:
    before, hurt, after = (bench.accept() for _ in range(3))
    damaged = bytearray(BODY.encode())
    damaged[at] ^= 1 << bit
    bench.store.run(
        lambda tx: tx.exec_driver_sql(
            "UPDATE jobs SET body = CAST(? AS TEXT) WHERE job_id = ?", (bytes(damaged), hurt)
        )
    )
    assert bench.select() == 2
    assert bench.store.state(hurt) == ("failed", "payload_damaged")
    assert [bench.store.job(job_id)["attempt"] for job_id in (before, after)] == [1, 1]
    events = [body for kind, body in bench.store.reports() if kind == "event"]
    assert [(body["code"], body["job_id"]) for body in events] == [("payload_damaged", hurt)]


def test_flipped_bit_in_a_waiting_report_does_not_stop_the_others(bench: Bench) -> None:
    bench.accept()
    bench.accept()
    bench.store.run(
        lambda tx: tx.exec_driver_sql(
            "UPDATE outbox SET body = CAST(x'7bff7d' AS TEXT) WHERE id = 1"
        )
    )
    assert len(bench.store.take()) == 2


@pytest.mark.parametrize(
    ("closed", "opened"),
    [
        (BoxView(temperature_c=90.0), BoxView(temperature_c=50.0)),
        (BoxView(is_idle=False), BoxView(is_idle=True)),
        (BoxView(is_on_mains=False), BoxView(is_on_mains=True)),
    ],
)
def test_job_waits_until_the_box_is_as_wished(
    bench: Bench, closed: BoxView, opened: BoxView
) -> None:
    bench.accept('{"window":{"idle":true,"max_temperature_c":70,"on_mains":true}}')
    bench.box = closed
    for _ in range(10):
        assert bench.select() == 0
        bench.store.clock.advance(60_000)
    bench.box = opened
    assert bench.select() == 1


def test_closed_window_holds_up_no_other_job(bench: Bench) -> None:
    bench.box = BoxView(is_idle=False)
    held = bench.accept('{"window":{"idle":true}}')
    free = bench.accept()
    bench.select()
    assert [bench.store.job(job_id)["attempt"] for job_id in (held, free)] == [0, 1]


@pytest.mark.usefixtures("berlin")
@pytest.mark.parametrize(
    ("accepted", "earliest", "latest"),
    [
        # 03:00 in Berlin is 02:00 UTC in winter and 01:00 UTC in summer.
        ("2026-11-22T20:00:00", "2026-11-23T02:00:00", "2026-11-23T03:00:00"),
        ("2026-11-22T02:30:00", "2026-11-22T02:30:00", "2026-11-22T02:30:10"),
        # Daylight saving begins: the night is an hour shorter.
        ("2027-03-27T20:00:00", "2027-03-28T01:00:00", "2027-03-28T02:00:00"),
        # It ends: the night is an hour longer.
        ("2026-10-24T20:00:00", "2026-10-25T02:00:00", "2026-10-25T03:00:00"),
    ],
)
def test_job_starts_while_its_window_is_open_in_local_time(
    bench: Bench, accepted: str, earliest: str, latest: str
) -> None:
    now, first, last = (datetime.fromisoformat(f"{t}+00:00") for t in (accepted, earliest, latest))
    bench.store.clock.wall = int(now.timestamp() * 1000)
    bench.accept('{"window":{"cron":"0 3 * * *","duration_s":3600}}')
    assert first <= bench.wait_for_start(86_400) < last


def test_clock_that_is_set_while_a_window_is_closed_is_noticed(bench: Bench) -> None:
    bench.store.clock.wall = 0
    bench.accept('{"window":{"cron":"0 0 1 1 *","duration_s":7200}}')
    bench.store.clock.advance(3 * 3_600_000)
    assert bench.select() == 0
    bench.store.clock.wall = int(datetime(2027, 1, 1, 0, 30).timestamp() * 1000)
    bench.store.clock.boot += 600_000
    assert bench.select() == 1
