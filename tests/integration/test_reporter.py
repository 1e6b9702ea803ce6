"""The reporter's turns on a real ledger, without a network: failed ones leave nothing behind."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import Connection

from agent.config import Settings
from agent.daemon.intake import ConsoleNews
from agent.daemon.messages import Connected, Disconnected
from agent.daemon.mqtt import MqttSession
from agent.daemon.reporter import Reporter, Selected
from agent.sections import OutboxSettings
from agent.store.facts import CONSOLE_ACKS, read_fact
from agent.store.outbox import count_records
from tests.harness.ledger import Store


class DiskError(Exception):
    """Stands for any failure between a turn's writes and its commit."""


def refuse_to_count() -> tuple[int, str]:
    raise TimeoutError


class Bench:
    """A reporter whose session never comes up, so that turns can be played by hand."""

    def __init__(self, folder: Path, ack: str = "auto") -> None:
        self.store = Store(folder / "ledger.db")
        self.settings = Settings(
            device_id="dev", data_dir=folder, outbox=OutboxSettings.model_validate({"ack": ack})
        )
        self.restart()

    def restart(self) -> None:
        session = MqttSession(
            self.settings,
            self.store.topics,
            lambda _message: None,
            refuse_to_count,
            lambda _times: None,
        )
        self.reporter = Reporter(self.settings, session, self.store.clock)
        self.store.run(lambda tx: self.reporter.start(tx, 1, "ledger-1"))
        self.reporter.connected(Connected(1, False, 100))

    def number(self, jobs: int) -> None:
        """Accept jobs and let their first states be numbered and taken note of."""
        for _ in range(jobs):
            self.store.accept()
        self.store.clock.advance(60_000)
        self.turn()

    def turn(self, news: ConsoleNews | None = None, *, fails: bool = False) -> Selected:
        """Play what the writer does with the reporter in one turn."""

        def write(tx: Connection) -> Selected:
            self.reporter.hear(tx, news or ConsoleNews())
            selected = self.reporter.select(tx, 0, 0)
            if fails:
                raise DiskError
            return selected

        selected: Selected = self.store.run(write)
        self.reporter.settle((), selected)
        return selected

    def count(self) -> int:
        return int(self.store.run(count_records))


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    bench = Bench(tmp_path)
    yield bench
    bench.store.close()


def test_acknowledgement_of_a_turn_that_failed_counts_when_the_turn_is_run_again(
    bench: Bench,
) -> None:
    bench.number(5)
    with pytest.raises(DiskError):
        bench.turn(ConsoleNews(acked_seq=3), fails=True)
    assert bench.count() == 5
    bench.turn(ConsoleNews(acked_seq=3))
    assert bench.count() == 2


def test_first_acknowledgement_in_a_turn_that_failed_is_remembered_over_a_restart(
    bench: Bench,
) -> None:
    bench.number(5)
    with pytest.raises(DiskError):
        bench.turn(ConsoleNews(acked_seq=3), fails=True)
    assert bench.reporter.acknowledged_by == "broker"
    bench.turn(ConsoleNews(acked_seq=3))
    assert bench.store.run(lambda tx: read_fact(tx, CONSOLE_ACKS)) == "1"
    bench.restart()
    assert bench.reporter.acknowledged_by == "console"


def test_sync_answer_sends_again_exactly_what_is_above_it(bench: Bench) -> None:
    bench.number(9)
    bench.turn(ConsoleNews(acked_seq=4, replay_after=4))
    assert [record.seq for record in bench.turn().records] == [5, 6, 7, 8, 9]
    assert not bench.turn().records


def test_replay_goes_before_new_records_and_loses_none_of_them(bench: Bench) -> None:
    bench.number(3)
    bench.store.accept()
    bench.store.clock.advance(60_000)
    bench.turn(ConsoleNews(acked_seq=0, replay_after=0))
    bench.store.accept()
    bench.store.clock.advance(60_000)
    seqs = [record.seq for _ in range(4) for record in bench.turn().records]
    assert seqs == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("seq", [10, 2**40])
def test_number_that_was_never_given_is_not_believed(bench: Bench, seq: int) -> None:
    bench.number(9)
    bench.turn(ConsoleNews(acked_seq=seq, replay_after=seq))
    assert bench.count() == 9
    assert bench.reporter.acknowledged_by == "broker"


def test_broker_mode_hears_no_console(tmp_path: Path) -> None:
    bench = Bench(tmp_path, ack="broker")
    bench.number(3)
    bench.turn(ConsoleNews(acked_seq=3, replay_after=0))
    assert bench.count() == 3
    assert not bench.turn().records
    bench.store.close()


def test_connection_that_ends_in_a_replay_goes_on_with_it_on_the_next(bench: Bench) -> None:
    bench.number(50)
    bench.turn(ConsoleNews(acked_seq=10, replay_after=10))
    bench.reporter.disconnected(1)
    bench.reporter.connected(Connected(2, True, 100))
    assert [record.seq for record in bench.turn().records] == list(range(11, 51))


def test_turn_with_a_new_connection_may_run_twice(bench: Bench) -> None:
    bench.number(5)
    for _ in range(2):
        # The store failed, and the same events are followed again.
        bench.reporter.disconnected(Disconnected(1, "").conn)
        bench.reporter.connected(Connected(2, True, 100))
    bench.store.accept()
    bench.store.clock.advance(60_000)
    seqs = [record.seq for _ in range(3) for record in bench.turn().records]
    assert seqs[-1] == 6
