"""What the daemon's threads say to the writer: one small immutable class each."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import Connection

from agent.jobs import Source
from agent.store.ledger import CrashReport, EndedJob, NewJob, Outcome


@dataclass(frozen=True, slots=True)
class Received:
    """A message from the MQTT broker; acknowledged after the commit."""

    conn: int
    mid: int
    topic: str
    payload: bytes
    expiry_s: int | None = None
    """Remaining life of the message, as the broker counted it down."""
    response_topic: str | None = None
    correlation: bytes | None = None


@dataclass(frozen=True, slots=True)
class Connected:
    """The MQTT session is up."""

    conn: int
    session_present: bool
    receive_maximum: int


@dataclass(frozen=True, slots=True)
class Disconnected:
    """The MQTT session is down."""

    conn: int
    why: str


@dataclass(frozen=True, slots=True)
class Acknowledged:
    """The MQTT broker has taken a publish (PUBACK)."""

    conn: int
    mid: int


@dataclass(frozen=True, slots=True)
class Spooled:
    """A job or a cancel from this box itself: a folder or the command line."""

    source: Source
    job: NewJob | None = None
    cancel: str | None = None
    done: Callable[[], None] | None = None
    """Called after the commit."""


@dataclass(frozen=True, slots=True)
class TaskOutcomes:
    """How the jobs of one task ended; `ack` is called after the commit."""

    task_id: str
    outcomes: tuple[Outcome, ...]
    ack: Callable[[], None]


@dataclass(frozen=True, slots=True)
class JobProgress:
    """How far the run of a job is."""

    job_id: str
    attempt: int
    progress: dict[str, Any]


@dataclass(frozen=True, slots=True)
class WorkerCrashed:
    """A worker has found what its predecessor crashed on."""

    report: CrashReport
    ack: Callable[[], None]


@dataclass(frozen=True, slots=True)
class SyncDue:
    """It is time to reconcile with the console."""


@dataclass(frozen=True, slots=True)
class Released:
    """A person trusts a model version in quarantine again."""

    model: str
    version: str
    done: Callable[[], None]


@dataclass(frozen=True, slots=True)
class TasksStarted:
    """Tasks that a worker has begun to run."""

    task_ids: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class TasksLost:
    """Tasks that will bring no outcome."""

    task_ids: tuple[str, ...]
    code: str
    message: str
    counts: bool
    """Whether the attempt may have run."""


@dataclass(frozen=True, slots=True)
class Call:
    """Something to run inside the writer's next transaction."""

    run: Callable[[Connection], Any]
    future: "Future[Any]" = field(default_factory=Future)


@dataclass(frozen=True, slots=True)
class Ended:
    """What a `Call` returns that has ended jobs."""

    jobs: Sequence[EndedJob]
    value: Any = None


@dataclass(frozen=True, slots=True)
class Wake:
    """Nothing but a reason to look again."""


Message = (
    Received
    | Connected
    | Disconnected
    | Acknowledged
    | Spooled
    | TaskOutcomes
    | TasksStarted
    | TasksLost
    | JobProgress
    | WorkerCrashed
    | SyncDue
    | Released
    | Call
    | Wake
)
