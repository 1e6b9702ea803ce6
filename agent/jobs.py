"""The job state machine: which states there are and who may follow whom.

    (new) ──► queued ──► running ──► succeeded
      │         │  ▲        │  └───► failed · timed_out · canceled
      │         │  └────────┘ interrupted attempt
      │         └──► failed · timed_out · canceled · expired
      └──► rejected · expired · canceled (a cancel that came before its submit)

Pure: no store, no clock, no wire. Invariants: an end is absorbing and carries
a reason with a stable code; every transition raises `rev` by exactly one.

Source: docs/protocol.md, "Jobs", rules 5 and 7.
"""

from dataclasses import dataclass
from enum import StrEnum

from agent.errors import IllegalTransitionError


class JobState(StrEnum):
    """States of a job, by their wire names."""

    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    TIMED_OUT = "timed_out"
    CANCELED = "canceled"
    EXPIRED = "expired"
    REJECTED = "rejected"


ENDS = frozenset(JobState) - {JobState.QUEUED, JobState.RUNNING}

_AFTER_NEW = frozenset({JobState.QUEUED, JobState.REJECTED, JobState.EXPIRED, JobState.CANCELED})
_AFTER: dict[JobState, frozenset[JobState]] = {
    JobState.QUEUED: frozenset(
        {
            JobState.RUNNING,
            JobState.FAILED,
            JobState.TIMED_OUT,
            JobState.CANCELED,
            JobState.EXPIRED,
        }
    ),
    JobState.RUNNING: frozenset(
        {
            JobState.QUEUED,
            JobState.SUCCEEDED,
            JobState.FAILED,
            JobState.TIMED_OUT,
            JobState.CANCELED,
        }
    ),
}


class Source(StrEnum):
    """Where a job came from."""

    MQTT = "mqtt"
    FOLDER = "folder"
    LOCAL = "local"


class Lane(StrEnum):
    """Queues that never wait for each other."""

    INFERENCE = "inference"
    BATCH = "batch"
    MAINTENANCE = "maintenance"


@dataclass(frozen=True)
class Reason:
    """Why a job is in its state: a stable code and a sentence for people."""

    code: str
    message: str = ""


def check_transition(before: JobState | None, after: JobState) -> None:
    """Allow a job to go from `before` (None: not known yet) to `after`, or refuse.

    Raises:
        IllegalTransitionError: the state machine has no such arrow.
    """
    allowed = _AFTER_NEW if before is None else _AFTER.get(before, frozenset())
    if after not in allowed:
        msg = f"a job cannot go from {before or 'new'} to {after}"
        raise IllegalTransitionError(msg)


def path_to(before: JobState, after: JobState) -> tuple[JobState, ...]:
    """Return the states a job passes on its way to `after`, the last one included.

    An outcome may reach the agent before the notice that its attempt started;
    the job then passes through `running` in the same transaction.

    Raises:
        IllegalTransitionError: there is no way.
    """
    if before is JobState.QUEUED and after is JobState.SUCCEEDED:
        return (JobState.RUNNING, after)
    check_transition(before, after)
    return (after,)
