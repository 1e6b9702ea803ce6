"""The run that is recorded: the product's ledger, used as the agent uses it.

Run as `python -m tests.fault.power_cuts.workload FOLDER --seed S --rounds N`. The
ledger is `FOLDER/data/ledger.db`. After each commit one line goes to `FOLDER/marks`:
what is acknowledged from here on. The states and revs in it are written out here by
hand, after docs/protocol.md; what was numbered is what the outbox gave out to send.

A mark, one JSON object:

- `jobs`: `{id: [state, rev]}` of each job that this commit changed;
- `sent`: `[[seq, body], …]` numbered by it; `deleted`: `[seq, …]`;
- `tables`: a digest of each table as this commit leaves it.
"""

import argparse
import json
import os
import random
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, event
from ulid import ULID

from agent.jobs import JobState, Lane, Reason, Source
from agent.store import outbox
from agent.store.database import migrate, open_engine, transaction
from agent.store.ledger import Ledger, NewJob, Outcome, ReadyJob
from agent.topics import Topics
from tests.fault.power_cuts.contents import digest_tables
from tests.harness.clocks import FakeClock

FAR_FUTURE_MS = 2**60
# Tiny, so that every few commits meet a checkpoint, and a large transaction spills
# pages into the WAL before it is committed or rolled back.
_CHECKPOINT_PAGES = 24
_CACHE_PAGES = 12


class Run:
    """The ledger, what is expected of it, and the marks.

    Args:
        folder: holds `data/` and `marks`.
        seed: of all choices.
        synchronous: SQLite's pragma; anything but FULL is a planted defect.
        acks_early: acknowledge before the commit: a planted defect.
    """

    def __init__(self, folder: Path, seed: int, synchronous: str, *, acks_early: bool) -> None:
        self.random = random.Random(seed)
        self._path = folder / "data" / "ledger.db"
        self._synchronous = synchronous
        self._acks_early = acks_early
        self._marks = os.open(folder / "marks", os.O_WRONLY | os.O_CREAT)
        self._clock = FakeClock()
        self.ledger = Ledger(Topics("dev"), self._clock)
        self._engine = self._open()
        self.states: dict[str, tuple[str, int]] = {}
        self.tasks: list[tuple[str, list[ReadyJob]]] = []
        self.sent: list[int] = []
        """Numbers on the wire and not deleted."""
        self.seq = 0
        self._mark: dict[str, Any] = {}
        self.commit(lambda _tx: None)

    def _open(self) -> Engine:
        engine = open_engine(self._path, self._synchronous)

        @event.listens_for(engine, "connect")
        def _on_connect(connection: Any, _record: Any) -> None:
            connection.execute(f"PRAGMA wal_autocheckpoint={_CHECKPOINT_PAGES}")
            connection.execute(f"PRAGMA cache_size={_CACHE_PAGES}")

        migrate(engine)
        return engine

    def commit(self, *steps: Callable[[Connection], None]) -> None:
        """Run the steps in one transaction, and acknowledge them."""
        self._clock.advance(self.random.randint(1, 500))
        self._mark = {"jobs": {}, "sent": [], "deleted": []}
        with transaction(self._engine) as tx:
            for step in steps:
                step(tx)
            raw: Any = tx.connection.driver_connection
            self._mark["tables"] = digest_tables(raw)
            if self._acks_early:
                self._acknowledge()
        if not self._acks_early:
            self._acknowledge()

    def _acknowledge(self) -> None:
        os.write(self._marks, json.dumps(self._mark).encode() + b"\n")

    def roll_back(self, *steps: Callable[[Connection], None]) -> None:
        """Run the steps in a transaction that fails; nothing of it may be seen."""
        before = dict(self.states)
        with suppress(InterruptedError), transaction(self._engine) as tx:
            for step in (*steps, _interrupt):
                step(tx)
        self.states = before

    def expect(self, job_id: str, state: str, steps: int = 1) -> None:
        """Note that a job is in `state`, `steps` transitions on."""
        rev = self.states.get(job_id, ("", 0))[1] + steps
        self.states[job_id] = (state, rev)
        self._mark["jobs"][job_id] = [state, rev]

    def make_id(self) -> str:
        """Return a ULID of the run's own clock and seed."""
        stamp = self._clock.wall.to_bytes(6, "big")
        return str(ULID.from_bytes(stamp + self.random.randbytes(10)))

    def note_sent(self, records: list[outbox.Record]) -> None:
        """Note which records were numbered, as they go on the wire."""
        self.sent += [record.seq or 0 for record in records]
        self.seq = max([self.seq, *self.sent])
        self._mark["sent"] += [[record.seq, record.body] for record in records]

    def note_deleted(self, seqs: list[int]) -> None:
        """Note which records the other side has."""
        self.sent = [seq for seq in self.sent if seq not in seqs]
        self._mark["deleted"] += seqs

    def now_ms(self) -> int:
        """Return the run's wall clock."""
        return self._clock.wall

    def checkpoint(self) -> None:
        """Empty the WAL and cut its file to nothing."""
        connection = self._engine.raw_connection()
        try:
            connection.cursor().execute("PRAGMA wal_checkpoint(TRUNCATE)")
        finally:
            connection.close()

    def reopen(self) -> None:
        """Close the ledger, which removes its WAL, and open it again."""
        self._engine.dispose()
        self._engine = self._open()

    def close(self) -> None:
        """Close the ledger."""
        self._engine.dispose()
        os.close(self._marks)


def _interrupt(_tx: Connection) -> None:
    raise InterruptedError


def accept(run: Run, count: int, body_bytes: int) -> Callable[[Connection], None]:
    """Accept new jobs in one group."""

    def step(tx: Connection) -> None:
        jobs = []
        for _ in range(count):
            filling = "x" * run.random.randrange(body_bytes)
            body = json.dumps({"model": "digits", "n": len(run.states), "text": filling})
            job_id = run.make_id()
            jobs.append(
                NewJob(job_id, Source.MQTT, body, "hash", "infer", Lane.INFERENCE, "digits")
            )
            run.expect(job_id, "queued")
        run.ledger.accept(tx, jobs)

    return step


def assign(run: Run, limit: int) -> Callable[[Connection], None]:
    """Put waiting jobs into a task."""

    def step(tx: Connection) -> None:
        ready = run.ledger.schedule.find_ready(tx, Lane.INFERENCE, limit)
        if ready:
            task = run.make_id()
            run.ledger.schedule.assign(tx, [(task, ready)])
            run.tasks.append((task, ready))

    return step


def start(run: Run) -> Callable[[Connection], None]:
    """Let the newest task run."""

    def step(tx: Connection) -> None:
        for task, jobs in run.tasks[-1:]:
            run.ledger.record_started(tx, [task])
            for job in jobs:
                if run.states[job.job_id][0] == "queued":
                    run.expect(job.job_id, "running")

    return step


def finish(run: Run) -> Callable[[Connection], None]:
    """End the oldest task's jobs: most succeed, one may fail, one may be taken back."""

    def step(tx: Connection) -> None:
        if not run.tasks:
            return
        task, jobs = run.tasks.pop(0)
        outcomes = []
        for job in jobs:
            state = run.states[job.job_id][0]
            if state not in ("queued", "running"):
                continue
            chance = run.random.random()
            if chance < 0.15:
                continue
            end = JobState.FAILED if chance < 0.3 else JobState.SUCCEEDED
            result = {"output": [run.random.random() for _ in range(20)]}
            now = run.now_ms()
            reason = Reason("ok" if end is JobState.SUCCEEDED else "inference_failed")
            outcomes.append(Outcome(job.job_id, job.attempt + 1, end, reason, now - 5, now, result))
            passes_running = state == "queued" and end is JobState.SUCCEEDED
            run.expect(job.job_id, end.value, 2 if passes_running else 1)
        run.ledger.record_outcomes(tx, outcomes)
        for job in jobs:
            if run.states[job.job_id][0] == "running":
                run.expect(job.job_id, "queued")
        run.ledger.requeue(tx, [task], Reason("worker_lost", "gone"), counts=False)

    return step


def cancel(run: Run) -> Callable[[Connection], None]:
    """Cancel one open job."""

    def step(tx: Connection) -> None:
        open_ids = [key for key, (state, _) in run.states.items() if state == "queued"]
        if open_ids:
            job_id = run.random.choice(open_ids)
            run.ledger.cancel(tx, [job_id], Source.MQTT)
            run.expect(job_id, "canceled")

    return step


def send(run: Run, limit: int) -> Callable[[Connection], None]:
    """Number records for the wire."""

    def step(tx: Connection) -> None:
        run.note_sent(outbox.take_unsent(tx, limit, FAR_FUTURE_MS))

    return step


def delete(run: Run) -> Callable[[Connection], None]:
    """Remove some records that the other side has, not always the oldest."""

    def step(tx: Connection) -> None:
        chosen = [seq for seq in run.sent if run.random.random() < 0.4]
        outbox.delete_acknowledged(tx, chosen)
        run.note_deleted(chosen)

    return step


def play(run: Run, rounds: int) -> None:
    """Play the run: as many rounds as asked, with all that may happen in between."""
    for number in range(rounds):
        group = run.random.randint(1, 5)
        run.commit(accept(run, group, 1200))
        run.commit(assign(run, 4), send(run, 3))
        if run.random.random() < 0.6:
            run.commit(start(run), accept(run, 1, 300))
        run.commit(finish(run), send(run, 6))
        run.commit(delete(run), cancel(run))
        (roll_back_large, Run.checkpoint, Run.reopen)[number % 3](run)


def roll_back_large(run: Run) -> None:
    """Roll back a transaction that has spilt pages into the WAL before."""
    run.roll_back(accept(run, 40, 4000))


def main() -> None:
    """Play one run, from the command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--rounds", type=int, required=True)
    parser.add_argument("--synchronous", default="FULL")
    parser.add_argument("--acks-early", action="store_true")
    options = parser.parse_args()
    run = Run(options.folder, options.seed, options.synchronous, acks_early=options.acks_early)
    play(run, options.rounds)
    run.close()


if __name__ == "__main__":
    main()
