"""Retention: how long ended jobs are remembered, so that no late duplicate ever runs.

One line, the *horizon*, decides both sides: an ended job is forgotten only if
its id is older than the horizon, and an unknown id older than the horizon is
refused as `too_old`. So an id that was forgotten can never run again, whatever
the clocks do. The horizon never goes back. It follows the smaller of the wall
clock and the newest id seen from a console: a box whose clock jumps a year
ahead neither forgets its ends nor refuses fresh jobs.

Ids are ULIDs: their first ten characters are the time of their making.

What has no such two sides (emptying inputs and results) goes by a time that is *believed*: the
wall clock, but a jump ahead only once it has lasted as long as they are kept.

All run inside the caller's transaction.
"""

from collections.abc import Collection

from sqlalchemy import Connection, Integer, bindparam, delete, func, select, update
from ulid import ULID

from agent.clock import Clock
from agent.jobs import Source
from agent.store.outbox import read_counter, save_counter
from agent.store.statements import Statement
from agent.store.transitions import JOBS, TRANSITIONS

_DAY_MS = 86_400_000
_HORIZON = "horizon_ms"
_NEWEST = "newest_id_ms"
_STRIPPED = "stripped_ms"
_BELIEVED = "believed_ms"
_DOUBTED = "doubted_ms"
# Clocks are set by network time now and then: not each correction is a jump.
_SLACK_MS = 3_600_000
_PREFIX = 10
_ULID_MAX_MS = 2**48 - 1
# However many jobs a box has: ids of the last day are always remembered.
_KEEP_AT_LEAST_MS = _DAY_MS
_KEEP_ENDS = 500_000

_COUNT_ENDED = Statement(select(func.count()).select_from(JOBS).where(JOBS.c.ended_ms.is_not(None)))
_NTH_OLDEST = Statement(
    select(JOBS.c.job_id)
    .order_by(JOBS.c.job_id)
    .limit(1)
    .offset(bindparam("b_skip", type_=Integer))
)


def id_time_ms(job_id: str) -> int:
    """Return when a job's id was made, by the clock of who made it."""
    return ULID.from_str(job_id).milliseconds


def floor_id(at_ms: int) -> str:
    """Return the first ten characters of the smallest id made at a time."""
    return str(ULID.from_timestamp(min(max(0, at_ms), _ULID_MAX_MS) / 1000))[:_PREFIX]


class Retention:
    """Owns the horizon of one ledger.

    Args:
        clock: wall time.
        keep_ends_days: how long ends are remembered.
        keep_bodies_days: how long inputs and results of ended jobs are kept.
    """

    def __init__(self, clock: Clock, keep_ends_days: int, keep_bodies_days: int) -> None:
        self._clock = clock
        self._keep_ms = keep_ends_days * _DAY_MS
        self._keep_bodies_ms = keep_bodies_days * _DAY_MS
        self._newest = ""
        self._floor = ""
        self._looked_boot_ms = clock.boot_ms()

    def begin(self, tx: Connection) -> None:
        """Take the horizon over from the last run."""
        self._floor = floor_id(read_counter(tx, _HORIZON))
        self._newest = floor_id(read_counter(tx, _NEWEST))

    def observe(self, job_id: str) -> None:
        """Take note of an id that a console made."""
        prefix = job_id[:_PREFIX]
        if prefix > self._newest:
            self._newest = prefix

    def is_forgotten(self, job_id: str) -> bool:
        """Say whether an id is older than ends are remembered."""
        return job_id[:_PREFIX] < self._floor

    def advance(self, tx: Connection) -> None:
        """Move the horizon on; the caller's commit comes before `forget` uses it."""
        now_ms = self._clock.wall_ms()
        newest_ms = id_time_ms(self._newest + "0" * 16) if self._newest else 0
        newest_ms = max(newest_ms, read_counter(tx, _NEWEST))
        # A console whose clock is ahead must not push the mark beyond what is now.
        seen_ms = min(now_ms, newest_ms)
        horizon_ms = max(read_counter(tx, _HORIZON), seen_ms - self._keep_ms)
        horizon_ms = max(horizon_ms, self._bound_by_count(tx, seen_ms))
        save_counter(tx, _NEWEST, newest_ms)
        save_counter(tx, _HORIZON, horizon_ms)
        self._floor = floor_id(horizon_ms)

    def seen_ms(self) -> int:
        """Return a time that is not ahead: the smaller of the clock and the newest id seen.

        0 where no console has sent anything yet.
        """
        newest_ms = id_time_ms(self._newest + "0" * 16) if self._newest else 0
        return min(self._clock.wall_ms(), newest_ms)

    def believe(self, tx: Connection) -> int:
        """Return the wall time as far as it is believed, and never more than the wall time.

        A clock that is set back is believed at once. One that jumps ahead, also while the agent
        is down, is believed after `keep_bodies_days` of running with it.
        """
        wall_ms, boot_ms = self._clock.wall_ms(), self._clock.boot_ms()
        lived_ms, self._looked_boot_ms = boot_ms - self._looked_boot_ms, boot_ms
        believed_ms = read_counter(tx, _BELIEVED) + lived_ms
        doubted_ms = read_counter(tx, _DOUBTED) + lived_ms
        is_new = believed_ms == lived_ms
        if is_new or wall_ms <= believed_ms + _SLACK_MS or doubted_ms >= self._keep_bodies_ms:
            believed_ms, doubted_ms = wall_ms, 0
        save_counter(tx, _BELIEVED, believed_ms)
        save_counter(tx, _DOUBTED, doubted_ms)
        return believed_ms

    def _bound_by_count(self, tx: Connection, seen_ms: int) -> int:
        """Return the horizon that leaves as many ends as may be kept, a day of them at least."""
        surplus = int(_COUNT_ENDED.fetch(tx)[0][0]) - _KEEP_ENDS
        if surplus <= 0:
            return 0
        oldest = _NTH_OLDEST.fetch(tx, b_skip=surplus)
        return min(id_time_ms(str(oldest[0][0])), seen_ms - _KEEP_AT_LEAST_MS) if oldest else 0

    def forget(self, tx: Connection, limit: int, undelivered: Collection[str] = ()) -> int:
        """Forget up to `limit` ended jobs beyond the horizon; return how many.

        Args:
            tx: the caller's transaction.
            limit: how many at most.
            undelivered: jobs of folders whose files still wait for their result: one that was
                forgotten would run again.
        """
        now_ms = self.believe(tx)
        is_local = JOBS.c.source != Source.MQTT.value
        query = (
            select(JOBS.c.job_id)
            .where(
                JOBS.c.job_id < self._floor,
                JOBS.c.ended_ms.is_not(None),
                # A folder's job has its id from this box, whose clock may be wrong: it is not
                # forgotten before its result had all the time to be delivered.
                ~is_local | (JOBS.c.ended_ms < now_ms - self._keep_ms),
                JOBS.c.job_id.not_in(undelivered),
            )
            .limit(limit)
        )
        job_ids = list(tx.execute(query).scalars())
        for table in (TRANSITIONS, JOBS):
            for start in range(0, len(job_ids), 500):
                some = job_ids[start : start + 500]
                tx.execute(delete(table).where(table.c.job_id.in_(some)))
        return len(job_ids)

    def strip(self, tx: Connection, limit: int, undelivered: Collection[str] = ()) -> None:
        """Empty the inputs and results of jobs that ended long enough ago.

        Args:
            tx: the caller's transaction.
            limit: how many at most.
            undelivered: jobs of folders whose results are not in their files yet.
        """
        before_ms = self.believe(tx) - self._keep_bodies_ms
        done_ms = read_counter(tx, _STRIPPED)
        if done_ms >= before_ms:
            # The clock was ahead and has been set back: what ended since is below the mark.
            done_ms = 0
        ended = (
            (JOBS.c.ended_ms > done_ms)
            & (JOBS.c.ended_ms < before_ms)
            # Without this more jobs than `limit` that ended in one millisecond (a whole batch
            # that expired) would hold up all the others for ever.
            & ((JOBS.c.body != "") | JOBS.c.result.is_not(None))
        )
        # A job that ended while the clock was years behind has its true age in its id.
        is_kept = JOBS.c.job_id.in_(undelivered) | (JOBS.c.job_id >= floor_id(before_ms))
        query = (
            select(JOBS.c.seq, JOBS.c.ended_ms)
            .where(ended, ~is_kept)
            .order_by(JOBS.c.ended_ms)
            .limit(limit)
        )
        rows = [(seq, ended_ms) for seq, ended_ms in tx.execute(query)]
        if not rows:
            return
        for start in range(0, len(rows), 500):
            some = [seq for seq, _ in rows[start : start + 500]]
            tx.execute(
                update(JOBS).where(JOBS.c.seq.in_(some)).values(body="", result=None, progress=None)
            )
        # The last millisecond may hold more jobs than there was room for: it is looked at again.
        last_ms = rows[-1][1]
        mark_ms = last_ms - 1 if len(rows) == limit else last_ms
        kept_ms = tx.execute(select(func.min(JOBS.c.ended_ms)).where(ended, is_kept)).scalar()
        save_counter(tx, _STRIPPED, mark_ms if kept_ms is None else min(mark_ms, kept_ms - 1))
