"""The gate: what ends a probation, what does not, and what commits. Every rule by hand."""

import pytest

from agent.daemon.gate import FigureBook, Tally, find_objection, is_enough, subtract
from agent.latency import compute_percentile_ms, find_step
from agent.lifecycle import Probation
from agent.tasks import FiguresBody, VersionFigures

RULES = Probation(duration_s=10.0, requests=5, min_agreement=0.9)


def latencies(ms: float, count: int = 100) -> dict[int, int]:
    return {find_step(int(ms * 1e6)): count}


@pytest.mark.parametrize(
    ("candidate", "previous", "growth_mb", "code"),
    [
        (Tally(), Tally(), 0.0, None),
        # Failures: a share, and so many at least.
        (Tally(success=10, failed=2), Tally(), 0.0, None),
        (Tally(success=10, failed=3), Tally(), 0.0, "probation_errors"),
        (Tally(success=1000, failed=3), Tally(), 0.0, None),
        (Tally(success=100, failed=3), Tally(), 0.0, "probation_errors"),
        (Tally(shadow_failed=3), Tally(), 0.0, "probation_errors"),
        (Tally(compared=1000, agreed=1000, shadow_failed=3), Tally(), 0.0, None),
        # Agreement: of enough copies.
        (Tally(compared=19, agreed=0), Tally(), 0.0, None),
        (Tally(compared=20, agreed=17), Tally(), 0.0, "probation_disagreement"),
        (Tally(compared=20, agreed=18), Tally(), 0.0, None),
        # Latency: enough answers on both sides, twice as long, and by a millisecond.
        (Tally(latencies=latencies(30)), Tally(latencies=latencies(10)), 0.0, "probation_slow"),
        (Tally(latencies=latencies(30, 99)), Tally(latencies=latencies(10)), 0.0, None),
        (Tally(latencies=latencies(30)), Tally(latencies=latencies(10, 99)), 0.0, None),
        (Tally(latencies=latencies(18)), Tally(latencies=latencies(10)), 0.0, None),
        (Tally(latencies=latencies(0.5)), Tally(latencies=latencies(0.1)), 0.0, None),
        # Memory.
        (Tally(), Tally(), 256.0, None),
        (Tally(), Tally(), 257.0, "probation_memory"),
    ],
)
def test_gate(candidate: Tally, previous: Tally, growth_mb: float, code: str | None) -> None:
    found = find_objection(RULES, candidate, previous, growth_mb)
    assert (found and found.code) == code


@pytest.mark.parametrize(
    ("lasted_s", "candidate", "meanwhile", "is_done"),
    [
        (10.0, Tally(success=5), Tally(), True),
        (9.9, Tally(success=5), Tally(), False),
        (10.0, Tally(success=4), Tally(), False),
    ],
)
def test_time_and_answers_commit(
    lasted_s: float, candidate: Tally, meanwhile: Tally, is_done: bool
) -> None:
    assert is_enough(RULES, lasted_s, candidate, meanwhile) == is_done


def test_version_that_answered_nobody_while_the_old_one_did_is_not_committed() -> None:
    rules = Probation(duration_s=1.0)
    assert not is_enough(rules, 100.0, Tally(), Tally(success=7))
    assert is_enough(rules, 100.0, Tally(success=1), Tally(success=7))
    # A model that nobody asks is committed by time alone.
    assert is_enough(rules, 100.0, Tally(), Tally())


def tell(worker: str, success: int, rss_mb: float = 100.0) -> FiguresBody:
    one = VersionFigures(model="m", version="2", success=success, failed=1, latencies={"100": 3})
    return FiguresBody(worker=worker, rss_mb=rss_mb, versions=[one])


def test_counts_go_on_over_the_restart_of_a_worker() -> None:
    book = FigureBook()
    book.add([tell("a", 10)])
    book.add([tell("a", 20)])
    book.add([tell("b", 5)])
    assert book.tally("m", 2).success == 25
    assert book.tally("m", 2).latencies == {100: 6}
    assert book.tally("m", 3) == Tally()


def test_growth_is_that_of_one_process_since_it_was_first_heard_of() -> None:
    book = FigureBook()
    book.add([tell("a", 1, 100.0), tell("b", 1, 500.0)])
    book.add([tell("a", 1, 150.0), tell("b", 1, 500.0)])
    assert book.find_growth_mb() == 50.0


def test_difference_of_tallies_is_never_less_than_none() -> None:
    now = Tally(success=5, failed=1, latencies={1: 5, 2: 1})
    then = Tally(success=3, failed=2, latencies={1: 2, 2: 4})
    assert subtract(now, then) == Tally(success=2, latencies={1: 3})


@pytest.mark.parametrize("ns", [1, 7, 8, 9, 100, 1000, 12_345, 10**6, 123_456_789, 10**10])
def test_percentile_is_at_most_an_eighth_off(ns: int) -> None:
    found = compute_percentile_ms({find_step(ns): 1}, 0.95)
    assert found is not None
    assert ns <= found * 1e6 <= max(ns * 1.13, ns + 1)


def test_percentile_of_nothing_is_none() -> None:
    assert compute_percentile_ms({}, 0.95) is None
