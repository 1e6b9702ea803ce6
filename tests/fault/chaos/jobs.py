"""Jobs as the chaos console makes them: ids, bodies, envelopes, and what it knows of each.

Written from docs/protocol.md, with nothing of the product: an agreement between a sender and
a receiver that share their code proves little.
"""

import json
import random
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from tests.fault.chaos.models import ECHO, ENDLESS, POISON, SLOW, WIDTH
from tests.fault.chaos.plan import Kind

ENDS = frozenset({"succeeded", "failed", "timed_out", "canceled", "expired", "rejected"})
_BASE32 = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"
_FOR_EVER = 2**62
Body = dict[str, Any]


def make_ulid(rng: random.Random) -> str:
    """Return a ULID: 48 bits of milliseconds, 80 random bits, five bits a character."""
    value = (int(time.time() * 1000) << 80) | rng.getrandbits(80)
    return "".join(_BASE32[(value >> shift) & 31] for shift in range(125, -1, -5))


def format_time(at_s: float) -> str:
    """Return seconds since 1970 as RFC 3339 in UTC, with milliseconds."""
    text = datetime.fromtimestamp(at_s, UTC).isoformat(timespec="milliseconds")
    return text.replace("+00:00", "Z")


@dataclass
class ChaosJob:
    """One job: what is to be sent, and what has been heard."""

    job_id: str
    kind: Kind
    body: Body
    other_body: Body | None = None
    """Of a conflict: what comes later under the same id."""
    not_after: float | None = None
    """On the wall clock, in seconds."""
    is_probe: bool = False
    copies: int = 1
    """How often its first submit is sent."""
    cancel_delay_s: float | None = None
    """How long after its submit it is cancelled."""
    sent: int = 0
    cancels_sent: int = 0
    others_sent: int = 0
    first_sent_at: float | None = None
    state: str | None = None
    rev: int = 0
    ended_at: float | None = None
    has_result: bool = False
    retry_s: float = 2.0

    @property
    def has_ended(self) -> bool:
        """Whether its end was heard."""
        return self.state in ENDS

    @property
    def is_complete(self) -> bool:
        """Whether it has ended, with its result where it succeeded."""
        return self.has_ended and (self.state != "succeeded" or self.has_result)


def make_job(rng: random.Random, kind: Kind, number: int) -> ChaosJob:
    """Return a new job of a sort; `number` makes its input unlike all others'."""
    job = ChaosJob(make_ulid(rng), kind, _make_body(rng, kind, number))
    # In every spelling of it: a reconcile answer must name the id in the body.
    job.body["job_id"] = job.job_id
    job.copies = rng.choices((1, 2, 3), (0.85, 0.1, 0.05))[0]
    if kind is Kind.CONFLICT:
        job.other_body = _looping(SLOW, 50_000 + number % 1000, job_id=job.job_id)
    if kind is Kind.EXPIRING:
        job.not_after = time.time() + rng.uniform(1.0, 2.5)
    if kind is Kind.LATE:
        job.not_after = time.time() - rng.uniform(1.0, 3600.0)
    if kind is Kind.CANCEL_LATER:
        job.cancel_delay_s = rng.choice((0.0, rng.uniform(0.0, 0.5), rng.uniform(0.5, 3.0)))
    return job


def make_probe(rng: random.Random, number: int) -> ChaosJob:
    """Return a job that measures how soon the box works again."""
    job = ChaosJob(make_ulid(rng), Kind.GOOD, _echoing(ECHO, number, priority=9))
    job.body["job_id"] = job.job_id
    job.is_probe, job.retry_s = True, 1.0
    return job


def _make_body(rng: random.Random, kind: Kind, number: int) -> Body:
    match kind:
        case Kind.BATCH:
            return _echoing(ECHO, number, handler="infer.batch")
        case Kind.SLOW:
            return _looping(SLOW, rng.randint(10_000, 250_000))
        case Kind.CANCEL_LATER if number % 2:
            return _looping(SLOW, rng.randint(10_000, 250_000))
        case Kind.CONFLICT:
            return _looping(SLOW, 1000 + number)
        case Kind.ENDLESS:
            return _looping(ENDLESS, _FOR_EVER, run_timeout_s=1)
        case Kind.POISON:
            return _echoing(POISON, number, params={"crash": True}, max_attempts=3)
        case Kind.BAD_INPUT:
            body = _echoing(ECHO, number)
            body["input"]["tensors"][0]["shape"] = [1, WIDTH + 1]
            return body
        case Kind.UNKNOWN_MODEL:
            return _echoing("nobody", number)
        case Kind.TTL:
            return _echoing(ECHO, number, queue_ttl_s=round(rng.uniform(0.3, 4.0), 2))
        case _:
            return _echoing(ECHO, number, priority=rng.randint(0, 9))


def _echoing(model: str, number: int, **keys: Any) -> Body:
    data = [float(number), number + 0.25, number + 0.5, number + 0.75]
    tensor = {"name": "x", "datatype": "FP32", "shape": [1, WIDTH], "data": data}
    return {"handler": "infer", "model": model, "input": {"tensors": [tensor]}, **keys}


def _looping(model: str, times: int, **keys: Any) -> Body:
    tensor = {"name": "x", "datatype": "INT64", "shape": [1], "data": [times]}
    return {"handler": "infer", "model": model, "input": {"tensors": [tensor]}, **keys}


def encode_submit(rng: random.Random, job: ChaosJob, body: Body) -> str:
    """Return a submit's envelope; the same body may be spelt in another order of its keys."""
    keys = list(body)
    rng.shuffle(keys)
    not_after = None if job.not_after is None else format_time(job.not_after)
    return encode_envelope(rng, "job.submit", {key: body[key] for key in keys}, not_after=not_after)


def encode_envelope(rng: random.Random, kind: str, body: Body, **fields: Any) -> str:
    """Return an envelope around a body."""
    envelope = {"v": 1, "id": make_ulid(rng), "type": kind, "ts": format_time(time.time())}
    return json.dumps({**envelope, **fields, "body": body})
