"""What the run had acknowledged before a cut, and whether a reopened ledger keeps it.

The oracle is the workload's marks. Nothing here is read from the product's code.
"""

import json
from dataclasses import dataclass, field, replace
from typing import Any

from tests.fault.power_cuts.contents import Contents
from tests.fault.power_cuts.recording import MARKS, Kind, Operation

_ENDS = {"succeeded", "failed", "timed_out", "canceled", "expired", "rejected"}
_CONTENT_TABLES = ("jobs", "transitions", "outbox")

State = tuple[str, int]


@dataclass(frozen=True)
class Promise:
    """Everything acknowledged up to one mark."""

    commit: int = -1
    jobs: dict[str, State] = field(default_factory=dict)
    sent: dict[int, str] = field(default_factory=dict)
    """Bodies of the records numbered and not deleted."""
    gone: frozenset[int] = frozenset()
    """Numbers of the deleted ones."""
    seq: int = 0
    tables: dict[str, str] = field(default_factory=dict)

    def extend(self, mark: dict[str, Any]) -> "Promise":
        """Return the promise after one more commit."""
        numbered = {int(seq): body for seq, body in mark["sent"]}
        gone = self.gone | set(mark["deleted"])
        sent = {seq: body for seq, body in {**self.sent, **numbered}.items() if seq not in gone}
        return Promise(
            commit=self.commit + 1,
            jobs={**self.jobs, **{key: tuple(value) for key, value in mark["jobs"].items()}},
            sent=sent,
            gone=gone,
            seq=max(self.seq, *numbered, 0),
            tables=mark["tables"],
        )


def read_promises(operations: list[Operation]) -> list[Promise]:
    """Return all promises of a run, the first one empty: before the schema stands."""
    promises = [Promise()]
    for operation in operations:
        if operation.name == MARKS and operation.kind is Kind.WRITTEN:
            promises.append(promises[-1].extend(json.loads(operation.data)))
    return promises


@dataclass(frozen=True)
class Losses:
    """How a reopened ledger breaks its promises; all zero where it keeps them."""

    acked_lost: int = 0
    """Acknowledged jobs that are missing, behind their rev, or in another end."""
    records_lost: int = 0
    """Numbered records missing or changed, and numbers that would be given again."""
    histories_broken: int = 0
    half_commits: int = 0
    """1 where the tables are not those of the newest acknowledged commit or the one under way."""

    def __bool__(self) -> bool:
        return self != Losses()


def find_losses(found: Contents, promised: Promise, upcoming: Promise | None) -> Losses:
    """Compare a reopened ledger with what was acknowledged before the cut.

    Args:
        found: what it holds.
        promised: the last acknowledged commit.
        upcoming: the commit after it, which may have lasted already.
    """
    losses = Losses(
        acked_lost=sum(
            not _keeps(found.jobs.get(job_id), state) for job_id, state in promised.jobs.items()
        ),
        records_lost=_count_lost_records(found, promised, upcoming),
        histories_broken=sum(
            found.histories.get(job_id, []) != _expected(found, job_id)
            for job_id in {*found.jobs, *found.histories}
        ),
    )
    known = [promised, *([upcoming] if upcoming else [])]
    return replace(losses, half_commits=int(not any(_is_commit(found, one) for one in known)))


def _keeps(found: State | None, promised: State) -> bool:
    if found is None or found[1] < promised[1]:
        return False
    is_settled = promised[0] in _ENDS or found[1] == promised[1]
    return not is_settled or found == promised


def _expected(found: Contents, job_id: str) -> list[tuple[int, str]] | None:
    """Return a history that fits the job's row: revs from 1 without a gap, its state last."""
    history = found.histories.get(job_id, [])
    state, rev = found.jobs.get(job_id, ("", 0))
    fits = [number for number, _ in history] == list(range(1, rev + 1))
    return history if fits and history and history[-1][1] == state else None


def _count_lost_records(found: Contents, promised: Promise, upcoming: Promise | None) -> int:
    deleted_since = upcoming.gone if upcoming else frozenset()
    lost = sum(
        found.sent.get(seq) != body
        for seq, body in promised.sent.items()
        if seq in found.sent or seq not in deleted_since
    )
    return lost + int(found.seq < promised.seq)


def _is_commit(found: Contents, promise: Promise) -> bool:
    if promise.commit < 0:
        return not (found.jobs or found.histories or found.sent)
    return found.tables == promise.tables
