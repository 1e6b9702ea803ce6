"""The batcher with real sessions: who waits, who joins, who fails, and that none is lost.

An instance held by the test is what makes requests wait: no test depends on how long a run takes.
"""

import asyncio
import threading
from collections.abc import Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from platforms.errors import RunStoppedError, TensorError
from platforms.runtimes.base import Array, RunStop, Session
from tests.harness.sessions import load_loop, load_negation, load_table
from tests.harness.waiting import wait_until
from worker.engine.batcher import Batcher, BatchOptions, WaitRules, run_stacked
from worker.engine.stats import StatsCounter
from worker.errors import RequestRejectedError, RequestTimeoutError

FOR_EVER = np.array([2**62])


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as pool:
        yield pool


@pytest.fixture
def negation(tmp_path: Path) -> Session:
    return load_negation(tmp_path)


def make_batcher(pool: ThreadPoolExecutor, **options: Any) -> Batcher:
    return Batcher(BatchOptions(**options), pool, StatsCounter("m", "1"))


def row(*values: float) -> dict[str, Array]:
    return {"x": np.array([values], np.float32)}


def find_sizes(batcher: Batcher) -> dict[int, int]:
    """Return how many runs there were of each batch size."""
    return {one.batch_size: one.compute_infer.count for one in batcher.stats.read().batches}


async def gather_while_held(
    batcher: Batcher, *requests: Coroutine[Any, Any, dict[str, Array]]
) -> list[Any]:
    """Let requests pile up behind an instance that is held, then let go of it."""
    assert batcher.try_acquire()
    tasks = []
    for number, request in enumerate(requests):
        tasks.append(asyncio.create_task(request))
        # Each must be in the queue before the next one comes: the order is what is tested.
        while batcher.pending <= number and not tasks[-1].done():
            await asyncio.sleep(0)
    batcher.release()
    return await asyncio.gather(*tasks, return_exceptions=True)


def test_lone_request_is_answered_at_once(pool: ThreadPoolExecutor, negation: Session) -> None:
    batcher = make_batcher(pool)
    outputs = asyncio.run(batcher.infer(negation, row(1, 2), 1))
    assert outputs["y"].tolist() == [[-1, -2]]
    wait_until(lambda: batcher.busy == 0, 30, "the instance is free")
    assert batcher.pending == 0
    stats = batcher.stats.read()
    assert (stats.inference_count, stats.execution_count, stats.success.count) == (1, 1, 1)


def test_what_waits_becomes_one_batch_and_each_gets_its_own_rows(
    pool: ThreadPoolExecutor, negation: Session
) -> None:
    batcher = make_batcher(pool)
    two = {"x": np.array([[3, 4], [5, 6]], np.float32)}
    answers = asyncio.run(
        gather_while_held(
            batcher,
            batcher.infer(negation, row(1, 2), 1),
            batcher.infer(negation, two, 2),
            batcher.infer(negation, row(7, 8), 1),
        )
    )
    assert [one["y"].tolist() for one in answers] == [[[-1, -2]], [[-3, -4], [-5, -6]], [[-7, -8]]]
    assert find_sizes(batcher) == {4: 1}
    stats = batcher.stats.read()
    assert (stats.inference_count, stats.execution_count, stats.success.count) == (4, 1, 3)
    assert stats.queue.count == stats.compute_infer.count == 3
    assert stats.success.ns > stats.queue.ns > 0


def test_batch_never_has_more_rows_than_the_limit(
    pool: ThreadPoolExecutor, negation: Session
) -> None:
    batcher = make_batcher(pool, max_rows=3)
    two = {"x": np.zeros((2, 2), np.float32)}
    requests = [batcher.infer(negation, two, 2), batcher.infer(negation, two, 2)]
    requests += [batcher.infer(negation, row(1, 1), 1) for _ in range(4)]
    asyncio.run(gather_while_held(batcher, *requests))
    # Rows are counted: 2 (another 2 would be 4), 2 + 1, 1 + 1 + 1.
    assert find_sizes(batcher) == {2: 1, 3: 2}


def test_request_of_more_rows_than_the_limit_runs_in_pieces(
    pool: ThreadPoolExecutor, negation: Session
) -> None:
    batcher = make_batcher(pool, max_rows=3)
    x = np.arange(14, dtype=np.float32).reshape(7, 2)
    outputs = asyncio.run(batcher.infer(negation, {"x": x}, 7))
    assert (outputs["y"] == -x).all()
    stats = batcher.stats.read()
    assert (stats.inference_count, stats.execution_count, stats.success.count) == (7, 3, 1)


def test_limit_that_is_lowered_stays_lowered(pool: ThreadPoolExecutor) -> None:
    batcher = make_batcher(pool, max_rows=8)
    batcher.limit_rows(2)
    batcher.limit_rows(5)
    assert batcher.max_rows == 2
    batcher.limit_rows(0)
    assert batcher.max_rows == 1


def test_other_shapes_do_not_join(pool: ThreadPoolExecutor, negation: Session) -> None:
    batcher = make_batcher(pool)
    answers = asyncio.run(
        gather_while_held(
            batcher,
            batcher.infer(negation, row(1, 2), 1),
            batcher.infer(negation, row(3), 1),
            batcher.infer(negation, row(4, 5), 1),
        )
    )
    assert [one["y"].tolist() for one in answers] == [[[-1, -2]], [[-3]], [[-4, -5]]]
    assert find_sizes(batcher) == {2: 1, 1: 1}


def test_other_sessions_do_not_join(
    pool: ThreadPoolExecutor, negation: Session, tmp_path: Path
) -> None:
    (tmp_path / "other").mkdir()
    other = load_negation(tmp_path / "other")
    batcher = make_batcher(pool)
    asyncio.run(
        gather_while_held(
            batcher, *(batcher.infer(one, row(1), 1) for one in (negation, other, negation))
        )
    )
    assert find_sizes(batcher) == {2: 1, 1: 1}


def test_model_without_a_batch_axis_runs_each_request_alone(
    pool: ThreadPoolExecutor, negation: Session
) -> None:
    batcher = make_batcher(pool, is_batchable=False)
    requests = [batcher.infer(negation, row(1), 1) for _ in range(3)]
    asyncio.run(gather_while_held(batcher, *requests))
    assert find_sizes(batcher) == {1: 3}


def test_guilty_request_fails_alone(pool: ThreadPoolExecutor, tmp_path: Path) -> None:
    table = load_table(tmp_path)
    batcher = make_batcher(pool)
    answers = asyncio.run(
        gather_while_held(
            batcher, *(batcher.infer(table, {"x": np.array([[n]])}, 1) for n in (0, 99, 2))
        )
    )
    assert isinstance(answers[1], TensorError)
    assert [answers[n]["y"].tolist() for n in (0, 2)] == [[[10]], [[30]]]
    stats = batcher.stats.read()
    assert (stats.success.count, stats.fail.count, stats.failures["BACKEND"]) == (2, 1, 1)


def test_full_queue_refuses_and_those_who_wait_are_answered(
    pool: ThreadPoolExecutor, negation: Session
) -> None:
    batcher = make_batcher(pool, queue=WaitRules(2))
    answers = asyncio.run(
        gather_while_held(batcher, *(batcher.infer(negation, row(1), 1) for _ in range(3)))
    )
    assert [type(one) for one in answers] == [dict, dict, RequestRejectedError]
    assert batcher.stats.read().failures["REJECTED"] == 1


def test_most_urgent_runs_first_and_equals_in_order(
    pool: ThreadPoolExecutor, negation: Session
) -> None:
    batcher = make_batcher(pool, max_rows=1)
    order: list[str] = []

    async def ask(name: str, priority: int) -> dict[str, Array]:
        outputs = await batcher.infer(negation, row(1), 1, priority=priority)
        order.append(name)
        return outputs

    # 0 stands for the default, which is 2.
    asked = [("late", 3), ("a", 0), ("first", 1), ("b", 2)]
    asyncio.run(gather_while_held(batcher, *(ask(*one) for one in asked)))
    assert order == ["first", "a", "b", "late"]


def test_thread_s_turn_comes_in_the_same_order_as_requests(
    pool: ThreadPoolExecutor, negation: Session
) -> None:
    batcher = make_batcher(pool)
    order: list[str] = []

    def take(name: str, priority: int) -> None:
        with batcher.acquire(priority):
            order.append(name)

    async def ask() -> None:
        await batcher.infer(negation, row(1), 1, priority=2)
        order.append("request")

    async def run() -> None:
        assert batcher.try_acquire()
        threads = []
        for name, priority in (("last", 3), ("first", 1)):
            before = len(batcher._queue)
            thread = threading.Thread(target=take, args=(name, priority))
            thread.start()
            threads.append(thread)
            while len(batcher._queue) <= before:
                await asyncio.sleep(0)
        task = asyncio.create_task(ask())
        while not batcher.pending:
            await asyncio.sleep(0)
        batcher.release()
        await task
        for thread in threads:
            await asyncio.to_thread(thread.join, 30)

    asyncio.run(run())
    assert order[0] == "first"
    assert sorted(order[1:]) == ["last", "request"]
    wait_until(lambda: batcher.busy == 0, 30, "the instance is free")


def test_instances_bound_the_runs_of_all_kinds(pool: ThreadPoolExecutor) -> None:
    batcher = make_batcher(pool, instances=2)
    assert batcher.try_acquire(is_idle=True)
    assert not batcher.try_acquire(is_idle=True)
    assert batcher.try_acquire()
    assert not batcher.try_acquire()
    batcher.release()
    batcher.release()
    assert batcher.busy == 0


def test_stop_ends_the_wait_for_a_turn(pool: ThreadPoolExecutor) -> None:
    batcher = make_batcher(pool)
    stop = RunStop()
    assert batcher.try_acquire()
    waiting = pool.submit(batcher.wait, 0, stop)
    wait_until(lambda: batcher._queue, 30, "the thread waits")
    stop.set()
    with pytest.raises(RunStoppedError):
        waiting.result(30)
    batcher.release()
    assert batcher.busy == 0
    with batcher.acquire(0, stop):
        pass


def test_request_that_waits_too_long_is_told_so(
    pool: ThreadPoolExecutor, negation: Session
) -> None:
    batcher = make_batcher(pool, queue=WaitRules(timeout_s=0.01))

    async def run() -> dict[str, Array]:
        assert batcher.try_acquire()
        with pytest.raises(RequestTimeoutError):
            await batcher.infer(negation, row(1), 1)
        assert batcher.pending == 0
        batcher.release()
        return await batcher.infer(negation, row(1), 1, timeout_s=60)

    assert asyncio.run(run())["y"].tolist() == [[-1]]
    assert batcher.stats.read().failures["REJECTED"] == 1


@pytest.mark.parametrize(
    ("default_s", "is_free", "asked_s", "expected_s"),
    [
        (None, True, None, None),
        (None, True, 3, 3),
        (None, False, 3, None),
        (2, True, None, 2),
        (2, True, 3, 2),
        (2, True, 1, 1),
        (2, False, 1, 2),
    ],
)
def test_timeout_is_the_shorter_one_where_a_request_may_name_its_own(
    default_s: float | None, is_free: bool, asked_s: float | None, expected_s: float | None
) -> None:
    rules = WaitRules(timeout_s=default_s, is_timeout_free=is_free)
    assert rules.choose_timeout_s(asked_s) == expected_s


def is_late(batcher: Batcher) -> bool:
    """Say whether one of those who wait has waited too long, and waits on."""
    return any(entry.order[1] for entry in batcher._queue)


@pytest.mark.parametrize("is_seen_by_timer", [True, False])
def test_delayed_request_runs_after_all_others_of_its_priority_but_before_less_urgent_ones(
    pool: ThreadPoolExecutor, negation: Session, is_seen_by_timer: bool
) -> None:
    rules = WaitRules(timeout_s=3600, is_delaying=True)
    batcher = make_batcher(pool, max_rows=1, priority_levels=2, queue=rules)
    order: list[str] = []

    async def ask(name: str, priority: int, timeout_s: float | None = None) -> None:
        await batcher.infer(negation, row(1), 1, priority=priority, timeout_s=timeout_s)
        order.append(name)

    async def run() -> None:
        assert batcher.try_acquire()
        first = ask("delayed", 1, 0.001 if is_seen_by_timer else None)
        tasks = [asyncio.create_task(first)]
        while not batcher.pending:
            await asyncio.sleep(0)
        (waiting,) = batcher._queue
        if is_seen_by_timer:
            while not is_late(batcher):
                await asyncio.sleep(0.001)
        else:
            # As where the event loop is too busy for timers: the next run sees it.
            waiting.deadline_ns = 0  # type: ignore[union-attr]
        for number, (name, priority) in enumerate((("less urgent", 2), ("later", 1)), 2):
            tasks.append(asyncio.create_task(ask(name, priority)))
            while batcher.pending < number:
                await asyncio.sleep(0)
        batcher.release()
        await asyncio.gather(*tasks)

    asyncio.run(run())
    assert order == ["later", "delayed", "less urgent"]
    stats = batcher.stats.read()
    assert (stats.success.count, stats.fail.count, batcher.pending) == (3, 0, 0)


def test_delayed_request_that_nobody_waits_for_any_more_is_not_run(
    pool: ThreadPoolExecutor, negation: Session
) -> None:
    batcher = make_batcher(pool, queue=WaitRules(timeout_s=0.01, is_delaying=True))

    async def run() -> None:
        assert batcher.try_acquire()
        task = asyncio.create_task(batcher.infer(negation, row(1), 1))
        while not is_late(batcher):
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        batcher.release()

    asyncio.run(run())
    assert (batcher.pending, batcher.busy, batcher._queue) == (0, 0, [])
    assert batcher.stats.read().execution_count == 0


def test_each_priority_has_its_own_timeout_and_its_own_bound(
    pool: ThreadPoolExecutor, negation: Session
) -> None:
    batcher = make_batcher(
        pool,
        queue=WaitRules(requests_max=1),
        priority_levels=3,
        default_priority=3,
        priority_queues={1: WaitRules(2), 2: WaitRules(timeout_s=0.01)},
    )
    answers = asyncio.run(
        gather_while_held(
            batcher, *(batcher.infer(negation, row(1), 1, priority=one) for one in (3, 1, 1, 1))
        )
    )
    assert [type(one) for one in answers] == [dict, dict, dict, RequestRejectedError]
    assert "2 requests of priority 1 wait" in str(answers[3])
    wait_until(lambda: batcher.busy == 0, 30, "the instance is free")

    async def wait_too_long() -> None:
        assert batcher.try_acquire()
        others = [asyncio.create_task(batcher.infer(negation, row(1), 1, priority=7))]
        with pytest.raises(RequestTimeoutError):
            await batcher.infer(negation, row(1), 1, priority=2)
        # A level that there is not is the default one, whose queue is full.
        for priority in (0, 3, 99):
            with pytest.raises(RequestRejectedError, match="of priority 3"):
                await batcher.infer(negation, row(1), 1, priority=priority)
        batcher.release()
        await asyncio.gather(*others)

    asyncio.run(wait_too_long())
    assert batcher.pending == 0


def test_without_levels_all_priorities_share_one_bound(
    pool: ThreadPoolExecutor, negation: Session
) -> None:
    batcher = make_batcher(pool, queue=WaitRules(2))
    requests = [batcher.infer(negation, row(1), 1, priority=one) for one in (1, 5, 9)]
    answers = asyncio.run(gather_while_held(batcher, *requests))
    assert [type(one) for one in answers] == [dict, dict, RequestRejectedError]


def test_requests_of_a_model_that_joins_none_run_alone(
    pool: ThreadPoolExecutor, negation: Session
) -> None:
    batcher = make_batcher(pool, is_joining=False, max_rows=2)
    four = {"x": np.zeros((4, 1), np.float32)}
    asyncio.run(
        gather_while_held(
            batcher, batcher.infer(negation, row(1), 1), batcher.infer(negation, four, 4)
        )
    )
    assert find_sizes(batcher) == {1: 1, 2: 2}


def test_cancelled_request_leaves_the_queue(pool: ThreadPoolExecutor, negation: Session) -> None:
    batcher = make_batcher(pool)

    async def run() -> None:
        assert batcher.try_acquire()
        task = asyncio.create_task(batcher.infer(negation, row(1), 1))
        while not batcher.pending:
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert batcher.pending == 0
        batcher.release()

    asyncio.run(run())
    stats = batcher.stats.read()
    assert (stats.execution_count, stats.failures["CANCELED"]) == (0, 1)


def test_run_that_nobody_waits_for_any_more_is_ended(
    pool: ThreadPoolExecutor, tmp_path: Path
) -> None:
    loop = load_loop(tmp_path)
    batcher = make_batcher(pool, is_batchable=False)

    async def run() -> dict[str, Array]:
        task = asyncio.create_task(batcher.infer(loop, {"x": FOR_EVER}, 1))
        while not batcher.busy or batcher.pending:
            await asyncio.sleep(0.001)
        task.cancel()
        # The one instance is free again although the run had no end of its own.
        return await asyncio.wait_for(batcher.infer(loop, {"x": np.array([3])}, 1), 60)

    assert asyncio.run(run())["y"].tolist() == [3]


def test_delay_lets_a_batch_fill_and_a_full_one_goes_at_once(
    pool: ThreadPoolExecutor, negation: Session
) -> None:
    batcher = make_batcher(pool, max_rows=3, max_queue_delay_s=60)

    async def run() -> None:
        requests = (batcher.infer(negation, row(1), 1) for _ in range(6))
        await asyncio.wait_for(asyncio.gather(*requests), 50)

    asyncio.run(run())
    assert find_sizes(batcher) == {3: 2}
    wait_until(lambda: batcher.busy == 0, 30, "the instance is free")


def test_delay_ends_for_a_lone_request_and_for_a_waiting_thread(
    pool: ThreadPoolExecutor, negation: Session
) -> None:
    short = make_batcher(pool, max_queue_delay_s=0.01)
    assert asyncio.run(short.infer(negation, row(1), 1))["y"].tolist() == [[-1]]
    long = make_batcher(pool, max_queue_delay_s=600)

    async def run() -> None:
        task = asyncio.create_task(long.infer(negation, row(1), 1))
        while not long.pending:
            await asyncio.sleep(0)
        await asyncio.wait_for(asyncio.to_thread(long.wait), 50)
        long.release()
        await asyncio.wait_for(task, 50)

    asyncio.run(run())
    wait_until(lambda: long.busy == 0, 30, "the instance is free")


def test_delay_with_several_instances_leaves_nobody_waiting(
    pool: ThreadPoolExecutor, negation: Session
) -> None:
    batcher = make_batcher(pool, instances=3, max_rows=4, max_queue_delay_s=0.002)

    def take_turns() -> None:
        for n in range(30):
            with batcher.acquire(1 + n % 3):
                pass

    async def run() -> None:
        threads = [asyncio.to_thread(take_turns) for _ in range(2)]
        requests = (batcher.infer(negation, row(1), 1, priority=n % 4) for n in range(100))
        await asyncio.wait_for(asyncio.gather(*threads, *requests), 50)

    asyncio.run(run())
    wait_until(lambda: batcher.busy == 0, 30, "all instances are free")
    assert max(find_sizes(batcher)) <= 4


def test_preferred_batch_is_cut_from_what_waits(
    pool: ThreadPoolExecutor, negation: Session
) -> None:
    batcher = make_batcher(pool, preferred_rows=(2, 4))
    requests = [batcher.infer(negation, row(1), 1) for _ in range(7)]
    asyncio.run(gather_while_held(batcher, *requests))
    assert find_sizes(batcher) == {4: 1, 2: 1, 1: 1}


def test_answer_for_an_event_loop_that_has_closed_harms_nobody(
    pool: ThreadPoolExecutor, negation: Session
) -> None:
    batcher = make_batcher(pool)
    assert batcher.try_acquire()
    loop = asyncio.new_event_loop()
    batcher._submit(loop, negation, row(1), 1, 0, None)
    loop.close()
    batcher.release()
    wait_until(lambda: batcher.busy == 0, 30, "the instance is free")
    assert asyncio.run(batcher.infer(negation, row(2), 1))["y"].tolist() == [[-2]]


def test_many_clients_of_all_kinds_each_get_their_own_answer(
    pool: ThreadPoolExecutor, negation: Session
) -> None:
    batcher = make_batcher(pool, instances=2, max_rows=4, queue=WaitRules(1000))

    def take_turns(base: int) -> bool:
        good = True
        for n in range(base, base + 50):
            with batcher.acquire(n % 3):
                answers, _ = run_stacked(negation, [row(n)], [1], 4)
                good &= answers[0]["y"].tolist() == [[-n]]
        return good

    async def ask(n: int) -> bool:
        if n % 10 == 9:
            task = asyncio.create_task(batcher.infer(negation, row(n), 1))
            await asyncio.sleep(0)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            return True
        outputs = await batcher.infer(negation, row(n), 1, priority=n % 4)
        return bool(outputs["y"].tolist() == [[-n]])

    async def run() -> list[Any]:
        threads = [asyncio.to_thread(take_turns, 1000 * k) for k in range(3)]
        return await asyncio.gather(*threads, *(ask(n) for n in range(400)))

    assert all(asyncio.run(run()))
    wait_until(lambda: batcher.busy == 0, 30, "all instances are free")
    assert batcher.pending == 0
    assert max(find_sizes(batcher)) <= 4
