"""The bandwidth limit, on a clock that the test turns."""

from worker.update.throttle import Throttle


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def test_bytes_take_as_long_as_the_limit_says() -> None:
    clock = Clock()
    throttle = Throttle(100_000, clock)
    taken = 0
    while taken < 1_000_000:
        piece = throttle.choose_piece(64 << 10)
        clock.now_s += throttle.take(piece)
        taken += piece

    assert 0.99 * taken / 100_000 <= clock.now_s - 100 <= taken / 100_000


def test_time_in_which_nothing_came_is_not_made_up_for() -> None:
    clock = Clock()
    throttle = Throttle(100_000, clock)
    clock.now_s += 3600

    assert throttle.take(25_000) == 0
    assert throttle.take(100_000) == 1


def test_pieces_are_small_where_the_limit_is() -> None:
    assert Throttle(4_000).choose_piece(64 << 10) == 1_000
    assert Throttle(1).choose_piece(64 << 10) == 1


def test_no_limit_never_waits() -> None:
    throttle = Throttle(None)

    assert throttle.choose_piece(64 << 10) == 64 << 10
    assert throttle.take(1 << 40) == 0
