"""The queue before a model version's instances, and the batches made of it.

An instance is the right to run the model: so many at a time as the cores allow, whoever runs.
Two kinds wait for one: requests, which a batcher's threads run in batches, and turns, by which
a thread of its own (a queue job) runs what it likes. One order holds for both: the most urgent
first, then the one that came first.

As in Triton a batch forms when an instance is free, of what waits then: a request that finds one
free waits for nobody, and batches grow from backlog alone (`max_queue_delay_s` asks for more).
Rows are counted, not requests. Owns the queue, the stacking and the taking apart; never decides
how many rows pay (`costs`) or which version answers (`serving`).

A request that has waited longer than it may is refused, or, where the rules of its priority say
so, waits on behind all others of its priority, and then for as long as it takes. With priority
levels each level's queue has its own bound; without them all requests share one.
Source: Triton's `PriorityQueue` (core, `src/scheduler_utils.cc`).

Invariants: a run has at most `max_rows` rows; only requests to the same session with equal names,
dtypes and shapes but for axis 0 share a run; each request gets one answer or one error; one that
fails does so alone; who no longer waits is not run; an idle batcher has no thread at work.
"""

import asyncio
import bisect
import logging
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager
from dataclasses import dataclass, field
from operator import attrgetter
from threading import Condition, Event, Lock, get_ident
from typing import Any

import numpy as np

from platforms.errors import RunStoppedError
from platforms.runtimes.base import Array, RunStop, Session
from worker.engine.costs import ROWS_MAX
from worker.engine.memory import RowLimit, run_within
from worker.engine.stats import FailReason, RunTimes, StatsCounter
from worker.errors import OutputError, RequestRejectedError, RequestTimeoutError

Outputs = dict[str, Array]
Inputs = Mapping[str, Array]

_Order = tuple[int, bool, int]
"""Priority, whether it has waited too long, arrival: the smallest is next."""

_log = logging.getLogger(__name__)
_get_order = attrgetter("order")


@dataclass(frozen=True, slots=True)
class WaitRules:
    """How requests of one priority wait."""

    requests_max: int = 128
    """Requests that may wait; one more is refused."""
    timeout_s: float | None = None
    """Longest wait of requests that name none; None: for ever."""
    is_timeout_free: bool = True
    """A request may name its own timeout; one that is shorter, where there is one."""
    is_delaying: bool = False
    """Who has waited too long runs after all others of its priority, instead of being refused."""

    def choose_timeout_s(self, asked_s: float | None) -> float | None:
        """Return how long a request may wait that asks for so long."""
        if asked_s is None or not self.is_timeout_free:
            return self.timeout_s
        return asked_s if self.timeout_s is None else min(asked_s, self.timeout_s)


@dataclass(frozen=True, slots=True)
class BatchOptions:
    """How requests of a model wait, and what is made of them."""

    instances: int = 1
    """Runs at the same time."""
    max_rows: int = ROWS_MAX
    """Rows of the largest batch."""
    is_batchable: bool = True
    """False: each request runs alone, as it is."""
    queue: WaitRules = WaitRules()
    priority_queues: Mapping[int, WaitRules] = field(default_factory=dict)
    """Rules of single priority levels, in place of `queue`."""
    priority_levels: int = 0
    """Levels that requests may name, each with a queue of its own; 0: any, and one queue."""
    default_priority: int = 2
    """Of requests that name none, or one that is no level; 1 is the most urgent."""
    max_queue_delay_s: float = 0.0
    """How long a free instance waits for a fuller batch."""
    preferred_rows: tuple[int, ...] = ()
    """Batches to prefer, of those that what waits allows."""
    is_joining: bool = True
    """False: no two requests share a run."""
    request_rows_max: int | None = None
    """Rows that one request may have; None: any number."""
    is_cached: bool = False
    """Answers are kept, where there is a cache."""

    def choose_priority(self, asked: int) -> int:
        """Return the priority of a request that asks for this one; 0 stands for the default.

        As in Triton, one beyond the levels is the default, too.
        """
        is_level = asked > 0 and (not self.priority_levels or asked <= self.priority_levels)
        return asked if is_level else self.default_priority

    def get_rules(self, priority: int) -> WaitRules:
        """Return how requests of this priority wait."""
        return self.priority_queues.get(priority, self.queue)


class _Batch:
    """Requests that run together, and the switch that ends their run."""

    __slots__ = ("stop", "wanted")

    def __init__(self, requests: int) -> None:
        self.wanted = requests
        """Requests that somebody still waits for."""
        self.stop = RunStop()


@dataclass(slots=True, eq=False)
class _Waiting:
    """A request that waits or runs."""

    order: _Order
    queue: int
    """Its priority level, or 0 where there are none."""
    rules: WaitRules
    session: Session
    inputs: Inputs
    rows: int
    signature: object
    future: "asyncio.Future[Outputs]"
    arrived_ns: int
    deadline_ns: int | None
    taken_ns: int = 0
    batch: _Batch | None = None
    """What it runs in; None while it waits."""
    is_gone: bool = False
    """Nobody waits for it any more."""


@dataclass(slots=True, eq=False)
class _Turn:
    """A thread that waits for an instance."""

    order: _Order
    woken: Event = field(default_factory=Event)
    is_granted: bool = False


class Batcher:
    """Shares the instances of one model version among all who want to run it; thread-safe.

    Args:
        options: how.
        pool: runs batches; a batcher uses at most as many of its threads as it has instances.
        stats: counts what is run.
    """

    def __init__(self, options: BatchOptions, pool: Executor, stats: StatsCounter) -> None:
        self.options = options
        self.stats = stats
        self._pool = pool
        self._max_rows = options.max_rows
        self.row_limit = RowLimit()
        """How many rows have fitted into memory."""
        self._lock = Lock()
        self._changed = Condition(self._lock)
        self._queue: list[_Waiting | _Turn] = []
        self._busy = 0
        self._waiting = 0
        self._waiting_by: defaultdict[int, int] = defaultdict(int)
        self._arrivals = 0
        self._delaying = 0
        self.running: dict[int, float] = {}
        """When each thread that runs the model just now began, monotonic; by its id."""

    # --- what anyone may ask --------------------------------------------------------------

    @property
    def pending(self) -> int:
        """Requests that wait now."""
        return self._waiting

    @property
    def busy(self) -> int:
        """Instances that run now."""
        return self._busy

    def find_oldest_run_s(self) -> float:
        """Return how long the run lasts that has been going on longest; 0 where none is."""
        began = min(tuple(self.running.values()), default=None)
        return 0.0 if began is None else time.monotonic() - began

    @property
    def max_rows(self) -> int:
        """Rows of the largest batch, just now."""
        limit = self.row_limit.rows
        return self._max_rows if limit is None else min(self._max_rows, limit)

    def limit_rows(self, rows: int) -> None:
        """Make no larger batches from now on, as when memory has run out; never raises it."""
        self._max_rows = max(1, min(self._max_rows, rows))

    # --- threads that run for themselves ----------------------------------------------------

    def try_acquire(self, *, is_idle: bool = False) -> bool:
        """Take an instance if one is free and nobody waits; give it back by `release`.

        Args:
            is_idle: only if all of them are free.
        """
        with self._lock:
            limit = 1 if is_idle else self.options.instances
            if self._busy >= limit or self._queue:
                return False
            self._busy += 1
            return True

    def release(self) -> None:
        """Give an instance back: to the next turn, to a thread that runs what waits, or to none."""
        with self._lock:
            if not self._pass_on():
                return
        self._pool.submit(self._work)

    @contextmanager
    def acquire(self, priority: int = 0, stop: RunStop | None = None) -> Iterator[None]:
        """Hold an instance for the length of the block; blocks as `wait`.

        Raises:
            RunStoppedError: `stop` was set before the turn came.
        """
        if not self.try_acquire():
            self.wait(priority, stop)
        thread = get_ident()
        self.running[thread] = time.monotonic()
        try:
            yield
        finally:
            self.running.pop(thread, None)
            self.release()

    def wait(self, priority: int = 0, stop: RunStop | None = None) -> None:
        """Take an instance, to be given back by `release`; blocks until it is this thread's turn.

        Args:
            priority: 1 is the most urgent; 0 stands for the default.
            stop: ends the wait as well.

        Raises:
            RunStoppedError: `stop` was set before the turn came.
        """
        with self._lock:
            turn = _Turn(self._make_order(priority or self.options.default_priority))
            if self._busy < self.options.instances and not self._queue:
                self._busy += 1
                return
            self._insert(turn)
            # A thread that waits for a fuller batch goes on at once.
            self._changed.notify()
        if stop is not None:
            stop.connect(turn.woken.set)
        turn.woken.wait()
        with self._lock:
            if turn.is_granted:
                return
            self._queue.remove(turn)
        msg = "stopped while it waited for its model"
        raise RunStoppedError(msg)

    # --- requests -------------------------------------------------------------------------

    async def infer(
        self,
        session: Session,
        inputs: Inputs,
        rows: int,
        *,
        priority: int = 0,
        timeout_s: float | None = None,
    ) -> Outputs:
        """Run a request, batched with others where they wait; its outputs by name.

        Cancelling takes it out of the queue, or ends its run where nobody else is in it.

        Args:
            session: to run it on.
            inputs: that fit the session.
            rows: length of axis 0 of all of them, or 1 where the model has no batch axis.
            priority: 1 is the most urgent; 0 stands for the default.
            timeout_s: longest wait, or until it is put behind all others of its priority; None
                stands for the default.

        Raises:
            RequestRejectedError: too many wait already.
            RequestTimeoutError: it waited too long.
            PlatformError, WorkerError: the run failed.
        """
        loop = asyncio.get_running_loop()
        priority = self.options.choose_priority(priority)
        timeout_s = self.options.get_rules(priority).choose_timeout_s(timeout_s)
        item = self._submit(loop, session, inputs, rows, priority, timeout_s)
        timer = None
        if timeout_s is not None:
            timer = loop.call_later(timeout_s, self._expire, item)
        try:
            return await item.future
        except asyncio.CancelledError:
            self._withdraw(item)
            self.stats.add_failure(FailReason.CANCELED, time.perf_counter_ns() - item.arrived_ns)
            raise
        finally:
            if timer is not None:
                timer.cancel()

    def _submit(
        self,
        loop: asyncio.AbstractEventLoop,
        session: Session,
        inputs: Inputs,
        rows: int,
        priority: int,
        timeout_s: float | None,
    ) -> _Waiting:
        now, rules = time.perf_counter_ns(), self.options.get_rules(priority)
        queue = priority if self.options.priority_levels else 0
        with self._lock:
            waiting = self._waiting_by[queue] if queue else self._waiting
            if waiting >= rules.requests_max:
                self.stats.add_failure(FailReason.REJECTED)
                of = f" of priority {queue}" if queue else ""
                msg = f"{waiting} requests{of} wait for {self.stats.name} already; try later"
                raise RequestRejectedError(msg)
            item = _Waiting(
                order=self._make_order(priority),
                queue=queue,
                rules=rules,
                session=session,
                inputs=inputs,
                rows=rows,
                signature=self._make_signature(inputs),
                future=loop.create_future(),
                arrived_ns=now,
                deadline_ns=None if timeout_s is None else now + int(timeout_s * 1e9),
            )
            self._insert(item)
            self._waiting += 1
            if queue:
                self._waiting_by[queue] += 1
            must_start = self._busy < self.options.instances and not self._delaying
            self._busy += must_start
            if self._delaying:
                self._changed.notify()
        if must_start:
            self._pool.submit(self._work)
        return item

    def _make_order(self, priority: int, *, is_late: bool = False) -> _Order:
        self._arrivals += 1
        return (priority, is_late, self._arrivals)

    def _stop_waiting(self, item: _Waiting) -> None:
        self._waiting -= 1
        if item.queue:
            self._waiting_by[item.queue] -= 1

    def _make_signature(self, inputs: Inputs) -> object:
        if not (self.options.is_batchable and self.options.is_joining):
            return object()
        return tuple(
            (name, array.shape[1:], array.dtype.num) for name, array in sorted(inputs.items())
        )

    def _insert(self, entry: _Waiting | _Turn) -> None:
        if not self._queue or self._queue[-1].order < entry.order:
            self._queue.append(entry)
        else:
            bisect.insort(self._queue, entry, key=_get_order)

    def _withdraw(self, item: _Waiting) -> None:
        """Let go of a request nobody waits for: out of the queue, or out of its run."""
        if self._remove(item):
            return
        with self._lock:
            batch = item.batch
            if item.is_gone or batch is None:
                return
            item.is_gone = True
            batch.wanted -= 1
            is_last = not batch.wanted
        if is_last:
            batch.stop.set()

    def _remove(self, item: _Waiting) -> bool:
        """Take a request out of the queue; say whether it was there."""
        with self._lock:
            if item.is_gone or item.batch is not None:
                return False
            item.is_gone = True
            self._queue.remove(item)
            self._stop_waiting(item)
            return True

    def _expire(self, item: _Waiting) -> None:
        """End a wait that has lasted too long, or put it behind; runs on the event loop."""
        if item.rules.is_delaying:
            with self._lock:
                if not item.is_gone and item.batch is None and item.deadline_ns is not None:
                    self._put_behind(item)
        elif self._remove(item):
            self._reject_late(item)

    def _put_behind(self, item: _Waiting) -> None:
        """Let a request wait on behind all others of its priority, without an end."""
        self._queue.remove(item)
        item.deadline_ns = None
        item.order = self._make_order(item.order[0], is_late=True)
        self._insert(item)

    def _reject_late(self, item: _Waiting) -> None:
        waited_ns = time.perf_counter_ns() - item.arrived_ns
        self.stats.add_failure(FailReason.REJECTED, waited_ns)
        msg = f"it waited {waited_ns / 1e9:.3g} s for {self.stats.name}, longer than it may"
        _settle([(item.future, None, RequestTimeoutError(msg))])

    # --- the batcher's threads ------------------------------------------------------------

    def _work(self) -> None:
        """Run batch after batch until nobody waits: no hand-off between them."""
        while batch := self._take():
            self._run(batch)

    def _take(self) -> list[_Waiting]:
        """Return what to run next on the instance that this thread holds; nothing: it is gone."""
        with self._lock:
            while self._pass_on():
                self._apply_timeouts()
                delay_s = self._find_delay()
                if delay_s > 0:
                    self._delaying += 1
                    self._changed.wait(delay_s)
                    self._delaying -= 1
                    continue
                batch = self._collect()
                if batch:
                    self._start_another()
                    return batch
            self._start_another()
            return []

    def _pass_on(self) -> bool:
        """Say whether the instance at hand is for requests; else it goes to a turn, or is free."""
        if not self._queue:
            self._busy -= 1
            return False
        head = self._queue[0]
        if isinstance(head, _Turn):
            del self._queue[0]
            head.is_granted = True
            head.woken.set()
            return False
        return True

    def _start_another(self) -> None:
        """A delay leaves instances free while requests wait: put them to use."""
        if self._queue and self._busy < self.options.instances and not self._delaying:
            self._busy += 1
            self._pool.submit(self._work)

    def _apply_timeouts(self) -> None:
        now = time.perf_counter_ns()
        late = [
            item
            for item in self._queue
            if isinstance(item, _Waiting)
            and item.deadline_ns is not None
            and now >= item.deadline_ns
        ]
        for item in late:
            if item.rules.is_delaying:
                self._put_behind(item)
                continue
            item.is_gone = True
            self._queue.remove(item)
            self._stop_waiting(item)
            _call_soon(item.future.get_loop(), self._reject_late, item)

    def _find_delay(self) -> float:
        """Return how long to wait for a fuller batch, in seconds; 0: run what is there."""
        delay_s = self.options.max_queue_delay_s
        if delay_s <= 0 or not self._queue:
            return 0.0
        head = self._queue[0]
        if any(isinstance(entry, _Turn) for entry in self._queue) or isinstance(head, _Turn):
            return 0.0
        rows = sum(entry.rows for entry in self._find_joinable(head))
        if rows >= min((*self.options.preferred_rows, self.max_rows)):
            return 0.0
        return max(0.0, delay_s - (time.perf_counter_ns() - head.arrived_ns) / 1e9)

    def _find_joinable(self, head: _Waiting) -> list[_Waiting]:
        """Return who may share a run with `head`, itself first, in order, as far as rows allow."""
        found, rows = [head], head.rows
        for entry in self._queue[1:]:
            if isinstance(entry, _Turn) or not _is_alike(entry, head):
                continue
            rows += entry.rows
            if rows > self.max_rows:
                break
            found.append(entry)
        return found

    def _collect(self) -> list[_Waiting]:
        if not self._queue or isinstance(self._queue[0], _Turn):
            return []
        taken = _prefer(self._find_joinable(self._queue[0]), self.options.preferred_rows)
        if len(taken) == 1:
            del self._queue[0]
        else:
            names = {id(item) for item in taken}
            self._queue = [entry for entry in self._queue if id(entry) not in names]
        now, batch = time.perf_counter_ns(), _Batch(len(taken))
        for item in taken:
            self._stop_waiting(item)
            item.taken_ns, item.batch = now, batch
        return taken

    def _run(self, items: Sequence[_Waiting]) -> None:
        """Run requests together, and one by one where that fails; tell each its answer."""
        batch = items[0].batch
        stop = batch.stop if batch is not None else None
        thread = get_ident()
        self.running[thread] = time.monotonic()
        try:
            rows = [item.rows for item in items] if self.options.is_batchable else None
            parts = [item.inputs for item in items]
            answers, times = run_stacked(
                items[0].session, parts, rows, self.max_rows, stop, limit=self.row_limit
            )
        except Exception as exc:  # noqa: BLE001 (handed on to whoever waits)
            if len(items) > 1:
                self._run_alone(items)
            else:
                self._fail(items[0], exc)
            return
        finally:
            self.running.pop(thread, None)
        now = time.perf_counter_ns()
        wanted = [item for item in items if not item.is_gone]
        self.stats.add_run(
            sum(item.rows for item in items),
            len(wanted),
            times,
            total_ns=sum(now - item.arrived_ns for item in wanted),
            queue_ns=sum(item.taken_ns - item.arrived_ns for item in wanted),
        )
        _deliver([(item.future, answer, None) for item, answer in zip(items, answers, strict=True)])

    def _run_alone(self, items: Sequence[_Waiting]) -> None:
        """Give each its own run: only the guilty one may fail."""
        for item in items:
            with self._lock:
                if item.is_gone:
                    continue
                item.batch = _Batch(1)
            self._run([item])

    def _fail(self, item: _Waiting, exc: Exception) -> None:
        if not item.is_gone:
            spent_ns = time.perf_counter_ns() - item.arrived_ns
            self.stats.add_failure(FailReason.BACKEND, spent_ns)
        _deliver([(item.future, None, exc)])


def _is_alike(entry: _Waiting, head: _Waiting) -> bool:
    return entry.session is head.session and entry.signature == head.signature


def _prefer(items: list[_Waiting], preferred: Sequence[int]) -> list[_Waiting]:
    """Cut a batch to the largest preferred one that it fills, if it fills any."""
    rows, best = 0, len(items)
    wanted = [size for size in preferred if size <= sum(item.rows for item in items)]
    if not wanted:
        return items
    for count, item in enumerate(items):
        rows += item.rows
        if rows > max(wanted):
            best = max(1, count)
            break
    return items[:best]


# --- runs -----------------------------------------------------------------------------------


def run_stacked(
    session: Session,
    parts: Sequence[Inputs],
    rows: Sequence[int] | None,
    max_rows: int,
    stop: RunStop | None = None,
    *,
    check_finite: bool = False,
    limit: RowLimit | None = None,
) -> tuple[list[Outputs], RunTimes]:
    """Run several requests as one batch; their outputs in order, and where the time went.

    A single request of more than `max_rows` rows is run in pieces of that length.

    Args:
        session: whose rows are independent, unless there is one part and `rows` is None.
        parts: inputs of the same names, dtypes and shapes but for axis 0.
        rows: of each part; None for a model without a batch axis.
        max_rows: of one run.
        stop: ends the run.
        check_finite: refuse NaN and infinity.
        limit: where given, rows that do not fit into memory run in smaller pieces.

    Raises:
        OutOfMemoryError: not even one row fits.
        PlatformError: the run failed, or was stopped.
        OutputError: another number of rows came back than went in.
    """
    began = time.perf_counter_ns()
    inputs = parts[0]
    if len(parts) > 1:
        inputs = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    stacked = time.perf_counter_ns()
    total = sum(rows) if rows is not None else 0

    def run(piece: Inputs) -> Outputs:
        if limit is None or rows is None:
            return session.run(piece, stop, check_finite=check_finite)
        return run_within(session, piece, limit, stop, check_finite=check_finite)

    outputs = _run_pieces(run, inputs, total, max_rows) if total > max_rows else run(inputs)
    ran = time.perf_counter_ns()
    answers = [outputs]
    if len(parts) > 1 and rows is not None:
        _verify_rows(outputs, total)
        answers = _take_apart(outputs, rows)
    taken_apart = time.perf_counter_ns()
    batch_rows = min(total, max_rows) or 1
    runs = -(-total // batch_rows) or 1
    times = RunTimes(stacked - began, ran - stacked, taken_apart - ran, batch_rows, runs)
    return answers, times


def _run_pieces(
    run: Callable[[Inputs], Outputs], inputs: Inputs, rows: int, max_rows: int
) -> Outputs:
    pieces = []
    for start in range(0, rows, max_rows):
        piece = {name: array[start : start + max_rows] for name, array in inputs.items()}
        outputs = run(piece)
        _verify_rows(outputs, min(max_rows, rows - start))
        pieces.append(outputs)
    return {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}


def _verify_rows(outputs: Outputs, rows: int) -> None:
    if any(array.shape[:1] != (rows,) for array in outputs.values()):
        msg = f"{rows} rows went in, and another number came back"
        raise OutputError(msg)


def _take_apart(outputs: Outputs, rows: Sequence[int]) -> list[Outputs]:
    each = rows[0]
    if len(outputs) == 1 and rows.count(each) == len(rows):
        # Iterating is 3 times as fast as slicing, and of a small net this is what a batch costs.
        ((name, array),) = outputs.items()
        return [{name: piece} for piece in array.reshape(len(rows), each, *array.shape[1:])]
    answers, start = [], 0
    for count in rows:
        answers.append({name: array[start : start + count] for name, array in outputs.items()})
        start += count
    return answers


# --- answers ----------------------------------------------------------------------------------

_Answer = tuple["asyncio.Future[Outputs]", Outputs | None, Exception | None]


def _deliver(answers: Sequence[_Answer]) -> None:
    """Complete futures from another thread: one wake-up for each event loop."""
    by_loop: defaultdict[asyncio.AbstractEventLoop, list[_Answer]] = defaultdict(list)
    for answer in answers:
        by_loop[answer[0].get_loop()].append(answer)
    for loop, mine in by_loop.items():
        _call_soon(loop, _settle, mine)


def _call_soon(loop: asyncio.AbstractEventLoop, call: Any, *arguments: Any) -> None:
    try:
        loop.call_soon_threadsafe(call, *arguments)
    except RuntimeError:
        # The server that asked has stopped: nobody is left to tell.
        _log.debug("an answer came after its event loop had closed")


def _settle(answers: Sequence[_Answer]) -> None:
    for future, outputs, error in answers:
        if future.done():
            continue
        if error is not None:
            future.set_exception(error)
        elif outputs is not None:
            future.set_result(outputs)
