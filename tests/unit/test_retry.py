"""Back-off, by a table typed out by hand: base 1 s, at most 10 s."""

import pytest

from agent.retry import RetryClass, compute_delay_ms

INTERRUPTED, ERROR = RetryClass.INTERRUPTED, RetryClass.ERROR


@pytest.mark.parametrize(
    ("kind", "count", "least_ms", "most_ms"),
    [
        (INTERRUPTED, 1, 0, 0),
        (INTERRUPTED, 2, 500, 1000),
        (INTERRUPTED, 3, 1000, 2000),
        (INTERRUPTED, 4, 2000, 4000),
        (INTERRUPTED, 5, 4000, 8000),
        (INTERRUPTED, 6, 5000, 10_000),
        (INTERRUPTED, 100, 5000, 10_000),
        (ERROR, 1, 500, 1000),
        (ERROR, 2, 1000, 2000),
        (ERROR, 3, 2000, 4000),
        (ERROR, 4, 4000, 8000),
        (ERROR, 5, 5000, 10_000),
        (ERROR, 10_000, 5000, 10_000),
    ],
)
def test_wait_doubles_up_to_its_bound_with_half_of_it_jitter(
    kind: RetryClass, count: int, least_ms: int, most_ms: int
) -> None:
    assert compute_delay_ms(kind, count, 1.0, 10.0, jitter=0.0) == least_ms
    assert compute_delay_ms(kind, count, 1.0, 10.0, jitter=1.0) == most_ms
    for _ in range(20):
        assert least_ms <= compute_delay_ms(kind, count, 1.0, 10.0) <= most_ms


def test_jobs_that_failed_together_do_not_come_back_together() -> None:
    waits = {compute_delay_ms(ERROR, 5, 1.0, 300.0) for _ in range(50)}
    assert len(waits) > 25


@pytest.mark.parametrize("count", [1, 2, 30])
def test_base_of_nothing_waits_for_nothing(count: int) -> None:
    assert compute_delay_ms(ERROR, count, 0.0, 300.0) == 0


def test_base_over_the_bound_waits_no_longer_than_the_bound() -> None:
    assert compute_delay_ms(ERROR, 1, 86_400.0, 300.0, jitter=1.0) == 300_000
