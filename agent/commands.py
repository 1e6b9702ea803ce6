"""The wire schema, version 1: envelopes and the bodies of commands.

Owns what a payload must look like and turns bytes into checked objects, or an
error with a stable code. Pure: no broker, no store. Unknown fields are ignored
and kept (a job's body is stored as it came); numbers that JSON cannot carry
(NaN, 1e999), lone surrogates and deep nesting are malformed.

Source: docs/protocol.md, "Envelope" and "Jobs".
"""

import hashlib
import json
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import from_json, to_json
from ulid import ULID

from agent.clock import parse_at
from agent.errors import (
    InvalidBodyError,
    MalformedError,
    PayloadTooLargeError,
    UnknownHandlerError,
    UnsupportedTypeError,
    UnsupportedVersionError,
)
from agent.jobs import Lane
from agent.lifecycle import Desired, UpdateParams
from agent.manifest import NAME_PATTERN
from agent.window import Window

VERSION = 1
_STRICT = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False, allow_nan=False)
SUBMIT = "job.submit"
CANCEL = "job.cancel"
ACK = "ack"
SYNC = "sync"
TRUST = "model.trust"
DESIRED = "desired"
_SERIES = 32**3
_FILES_MAX = 1000

# Handlers a job may name, with the lane each runs in unless the job says another.
UPDATE = "update"
HANDLERS: dict[str, Lane] = {
    "infer": Lane.INFERENCE,
    "infer.batch": Lane.BATCH,
    UPDATE: Lane.MAINTENANCE,
}


def new_id() -> str:
    """Return a new ULID: 26 characters that sort by time of making."""
    return str(ULID())


class IdSeries:
    """ULIDs for the messages of one process, at a tenth of the price of `new_id`.

    The first 23 characters, the time and 65 random bits, are those of one ULID;
    the last three count. A new one begins every 2¹⁵ ids.
    """

    _DIGITS = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"

    def __init__(self) -> None:
        self._pairs = tuple(a + b for a in self._DIGITS for b in self._DIGITS)
        self._head = ""
        self._count = _SERIES

    def next(self) -> str:
        """Return the next id; not for several threads."""
        if self._count == _SERIES:
            self._head, self._count = new_id()[:23], 0
        high, low = divmod(self._count, len(self._DIGITS))
        self._count += 1
        return self._head + self._pairs[high] + self._DIGITS[low]


class _Wire(BaseModel):
    # Unknown fields are for later versions; what is known is taken literally.
    model_config = ConfigDict(extra="ignore", frozen=True, allow_inf_nan=False)


class Envelope(_Wire):
    """What every message carries around its body."""

    v: int
    id: str = Field(min_length=1, max_length=64)
    type: str = Field(min_length=1, max_length=64)
    ts: str | None = None
    not_before: str | None = None
    not_after: str | None = None
    corr: str | None = None
    body: dict[str, Any] = Field(default_factory=dict)


class TensorData(_Wire):
    """One tensor, in the Open Inference Protocol's JSON form."""

    name: str = Field(min_length=1)
    datatype: str
    shape: list[int]
    data: list[Any]


class JobInput(_Wire):
    """A job's input: exactly one of tensors, inline bytes, a file or files on the box."""

    tensors: list[TensorData] | None = None
    data_b64: str | None = None
    file: str | None = Field(default=None, min_length=1, max_length=4096)
    files: list[Annotated[str, Field(min_length=1, max_length=4096)]] | None = Field(
        default=None, min_length=1, max_length=_FILES_MAX
    )
    sha256: str | None = Field(default=None, pattern=r"^[0-9a-f]{64}$")
    size_bytes: int | None = Field(default=None, ge=0)

    def given(self) -> int:
        """Return how many of the forms are present."""
        forms = (self.tensors, self.data_b64, self.file, self.files)
        return sum(form is not None for form in forms)


_Body = TypeVar("_Body", bound=_Wire)


def _check_time(text: str | None) -> None:
    if text is not None:
        parse_at(text)


class SubmitBody(_Wire):
    """The body of `job.submit`."""

    handler: str
    job_id: str | None = None
    model: str = Field(pattern=NAME_PATTERN)
    version: str | None = Field(default=None, pattern=NAME_PATTERN)
    input: JobInput | None = None
    params: dict[str, Any] = Field(default_factory=dict)
    lane: Lane | None = None
    priority: int = Field(default=5, ge=0, le=9)
    queue_ttl_s: float | None = Field(default=None, gt=0, le=10**9)
    run_timeout_s: float | None = Field(default=None, gt=0, le=10**6)
    max_attempts: int | None = Field(default=None, ge=1, le=100)
    on_interrupt: Literal["retry", "fail"] = "retry"
    on_error: Literal["retry", "fail"] = "retry"
    retry_delay_s: float | None = Field(default=None, ge=0, le=86_400)
    progress_timeout_s: float | None = Field(default=None, gt=0, le=10**6)
    dedupe_key: str | None = Field(default=None, min_length=1, max_length=128)
    dedupe: Literal["drop_new", "replace_queued", "run_all"] = "drop_new"
    on_full: Literal["keep_newest", "keep_oldest", "fail"] = "keep_newest"
    window: Window | None = None
    key: str | None = Field(default=None, min_length=1, max_length=128)


class AckBody(_Wire):
    """The body of a console's acknowledgement."""

    seq: int = Field(ge=0)
    ledger: str | None = None


class SyncBody(_Wire):
    """The body of a console's side of a reconciliation."""

    ledger: str | None = None
    acked_seq: int | None = Field(default=None, ge=0)
    missing: list[dict[str, Any]] = Field(default_factory=list)
    unknown: list[str] = Field(default_factory=list)
    cancel: list[str] = Field(default_factory=list)


def decode_envelope(payload: bytes, max_bytes: int) -> Envelope:
    """Return the envelope in `payload`.

    Raises:
        PayloadTooLargeError: it has more than `max_bytes`.
        MalformedError: it is no JSON object of the envelope's form.
        UnsupportedVersionError: its `v` is another than ours.
    """
    if len(payload) > max_bytes:
        msg = f"the payload has {len(payload)} bytes; at most {max_bytes} travel inline"
        raise PayloadTooLargeError(msg)
    try:
        document = from_json(payload, allow_inf_nan=False, cache_strings="keys")
    except ValueError as exc:
        msg = f"not JSON: {exc}"
        raise MalformedError(msg) from exc
    version = document.get("v", VERSION) if isinstance(document, dict) else VERSION
    if type(version) is not int or version != VERSION:
        shown = repr(version)[:32]
        msg = f"envelope version {shown} is not spoken here; this device speaks {VERSION}"
        raise UnsupportedVersionError(msg)
    try:
        envelope = Envelope.model_validate(document)
        _check_time(envelope.not_before)
        _check_time(envelope.not_after)
    except ValidationError as exc:
        raise MalformedError(f"envelope: {describe(exc)}") from exc
    except (ValueError, OverflowError) as exc:
        msg = f"envelope: not_before or not_after is no RFC 3339 time: {exc}"
        raise MalformedError(msg) from exc
    return envelope


def check_type(envelope: Envelope, expected: str) -> None:
    """Refuse an envelope of another type than its topic is for.

    Raises:
        UnsupportedTypeError: the type differs.
    """
    if envelope.type != expected:
        msg = f"type {envelope.type!r} is not known on this topic; {expected!r} is"
        raise UnsupportedTypeError(msg)


def parse_submit(envelope: Envelope, job_id: str) -> SubmitBody:
    """Return the checked body of a job.

    Raises:
        UnsupportedTypeError: the envelope is no `job.submit`.
        UnknownHandlerError: no handler has that name.
        InvalidBodyError: the body does not fit the schema, or names another job than the topic.
    """
    check_type(envelope, SUBMIT)
    handler = envelope.body.get("handler")
    if isinstance(handler, str) and handler not in HANDLERS:
        msg = f"no handler {handler!r}; there are: {', '.join(sorted(HANDLERS))}"
        raise UnknownHandlerError(msg)
    try:
        body = SubmitBody.model_validate(envelope.body)
    except ValidationError as exc:
        raise InvalidBodyError(f"body: {describe(exc)}") from exc
    if body.job_id is not None and body.job_id != job_id:
        msg = f"the body names job {body.job_id}, the topic {job_id}"
        raise InvalidBodyError(msg)
    if body.handler == UPDATE:
        _check_update(body)
        return body
    if body.input is None or body.input.given() != 1:
        msg = "body: input: give exactly one of tensors, data_b64, file and files"
        raise InvalidBodyError(msg)
    if body.input.files is not None and body.handler != "infer.batch":
        msg = "body: input: files are for the handler infer.batch"
        raise InvalidBodyError(msg)
    return body


def _check_update(body: SubmitBody) -> None:
    """Refuse an update that names no release, or brings what is not its own.

    Raises:
        InvalidBodyError: it does.
    """
    if body.version is None or body.input is not None:
        msg = "body: an update names a version (the release), and has no input"
        raise InvalidBodyError(msg)
    if body.lane not in (None, Lane.MAINTENANCE):
        msg = "body: lane: updates run in the lane maintenance"
        raise InvalidBodyError(msg)
    read_update_params(body.params)


def read_update_params(params: dict[str, Any]) -> UpdateParams:
    """Return the checked `params` of an update.

    Raises:
        InvalidBodyError: one does not fit the schema.
    """
    try:
        return UpdateParams.model_validate(params)
    except ValidationError as exc:
        raise InvalidBodyError(f"body: params: {describe(exc)}") from exc


def parse_desired(envelope: Envelope) -> Desired:
    """Return the checked desired document.

    Raises:
        UnsupportedTypeError: the envelope is no `desired`.
        InvalidBodyError: the body does not fit the schema.
    """
    check_type(envelope, DESIRED)
    try:
        return Desired.model_validate(envelope.body)
    except ValidationError as exc:
        raise InvalidBodyError(f"body: {describe(exc)}") from exc


def parse_ack(envelope: Envelope) -> AckBody:
    """Return the checked body of an acknowledgement.

    Raises:
        UnsupportedTypeError: the envelope is no `ack`.
        InvalidBodyError: the body does not fit the schema.
    """
    check_type(envelope, ACK)
    return _validate(AckBody, envelope)


def parse_sync(envelope: Envelope) -> SyncBody:
    """Return the checked body of a console's sync.

    Raises:
        UnsupportedTypeError: the envelope is no `sync`.
        InvalidBodyError: the body does not fit the schema.
    """
    check_type(envelope, SYNC)
    return _validate(SyncBody, envelope)


def _validate(model: type[_Body], envelope: Envelope) -> _Body:
    try:
        return model.model_validate(envelope.body)
    except ValidationError as exc:
        raise InvalidBodyError(f"body: {describe(exc)}") from exc


def hash_text(text: str | bytes) -> str:
    """Return a short digest that tells two texts apart."""
    data = text.encode() if isinstance(text, str) else text
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def encode_body(body: dict[str, Any]) -> str:
    """Return a body's JSON as the ledger keeps it.

    Raises:
        MalformedError: it holds a number that JSON cannot carry, such as 1e999.
    """
    try:
        return encode(body)
    except ValueError as exc:
        msg = f"body: a number is out of JSON's range: {exc}"
        raise MalformedError(msg) from exc


def is_same_body(one: str, other: str) -> bool:
    """Say whether two JSON texts are the same value, whatever their spelling.

    One that was damaged on the disk is the same as nothing.
    """
    try:
        return _is_equal(from_json(one or "null"), from_json(other or "null"))
    except ValueError:
        return False


def _is_equal(one: Any, other: Any) -> bool:
    """Compare as JSON does: 2 and 2.0 are one number, 1 and true are two things."""
    if isinstance(one, bool) or isinstance(other, bool):
        return one is other
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_is_equal(one[k], other[k]) for k in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_is_equal, one, other))
    return bool(one == other)


def encode(value: object) -> str:
    """Return `value` as compact JSON.

    Raises:
        ValueError: it holds NaN or an infinity.
    """
    text = to_json(value).decode()
    if "NaN" in text or "Infinity" in text:
        # Perhaps only inside a string: the standard encoder tells, and refuses.
        return _STRICT.encode(value)
    return text


def describe(exc: ValidationError) -> str:
    """Return the first problem of a validation in one line for people."""
    first = exc.errors(include_url=False)[0]
    where = ".".join(str(part) for part in first["loc"]) or "(whole)"
    return f"{where}: {first['msg']}"
