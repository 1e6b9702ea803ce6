"""What the command line sends: the commands of a console, and the files in them.

Pure but for reading the input files. Builds envelopes of docs/protocol.md; how they
travel is `console.link`'s and `console.dropbox`'s part.
"""

import base64
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agent.clock import SystemClock, format_ms
from agent.commands import CANCEL, SUBMIT, TRUST, VERSION, encode, new_id
from console.errors import InlineTooLargeError, InputFileError

INLINE_BYTES = 190 * 1024
"""As base64 this is 253 KiB, which leaves room for the envelope in the 256 KiB of a payload."""


@dataclass(frozen=True)
class Wanted:
    """What a person asks of each input."""

    model: str
    version: str | None = None
    lane: str | None = None
    priority: int = 5


@dataclass(frozen=True)
class Command:
    """One command, ready to travel."""

    job_id: str
    payload: str
    shown: str = ""
    """What a person calls it: the input's name."""


def build_submit(wanted: Wanted, given: dict[str, Any], shown: str = "") -> Command:
    """Return the command that submits one job.

    Args:
        wanted: the model, and how to run it.
        given: the job's input as the protocol has it.
        shown: the input's name for people.
    """
    job_id = new_id()
    body: dict[str, Any] = {
        "handler": "infer",
        "job_id": job_id,
        "model": wanted.model,
        "input": given,
        "priority": wanted.priority,
    }
    if wanted.version is not None:
        body["version"] = wanted.version
    if wanted.lane is not None:
        body["lane"] = wanted.lane
    return Command(job_id, wrap(SUBMIT, body), shown)


def build_cancel(job_id: str) -> Command:
    """Return the command that cancels a job."""
    return Command(job_id, wrap(CANCEL, {"job_id": job_id}))


def build_trust(model: str, version: str) -> Command:
    """Return the command that lets a model version out of quarantine."""
    return Command(new_id(), wrap(TRUST, {"model": model, "version": version}))


def wrap(kind: str, body: dict[str, Any]) -> str:
    """Return an envelope around the body of a command."""
    head = {"v": VERSION, "id": new_id(), "type": kind, "ts": format_ms(SystemClock().wall_ms())}
    return encode({**head, "body": body})


def read_input(path: Path) -> dict[str, Any]:
    """Return a file as a job's input: `tensors` of a JSON file, else its bytes.

    Raises:
        InputFileError: it cannot be read, or is a JSON file whose `tensors` are no list.
        InlineTooLargeError: it has more bytes than travel inline.
    """
    try:
        size = path.stat().st_size
        if size > INLINE_BYTES:
            raise InlineTooLargeError(_word_too_large(path, size))
        content = path.read_bytes()
    except OSError as exc:
        msg = f"{path} cannot be read: {exc.strerror}"
        raise InputFileError(msg) from exc
    tensors = _find_tensors(content) if path.suffix == ".json" else None
    return {"data_b64": base64.b64encode(content).decode()} if tensors is None else tensors


def read_reference(path: Path) -> dict[str, Any]:
    """Return a file on the box as a job's input, by its absolute path, digest and size.

    Raises:
        InputFileError: it cannot be read here.
    """
    path = path.absolute()
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        return {"file": str(path), "sha256": digest, "size_bytes": path.stat().st_size}
    except OSError as exc:
        msg = f"{path} cannot be read: {exc.strerror}"
        raise InputFileError(msg) from exc


def _find_tensors(content: bytes) -> dict[str, Any] | None:
    """Return the tensors of a JSON document, or None where it is another one."""
    try:
        document = json.loads(content)
    except ValueError:
        return None
    if not isinstance(document, dict) or "tensors" not in document:
        return None
    if not isinstance(document["tensors"], list):
        msg = '"tensors" is a list of {name, datatype, shape, data}'
        raise InputFileError(msg)
    return {"tensors": document["tensors"]}


def _word_too_large(path: Path, size: int) -> str:
    return (
        f"{path} has {size} bytes, and {INLINE_BYTES} travel inside a command: put it in a folder "
        "that the box may read (its inbox, or one of limits.roots) and send it with --by-path"
    )
