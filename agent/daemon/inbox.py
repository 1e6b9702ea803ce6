"""Batch folders: files become jobs, results become JSON lines, with no broker at all.

    inbox/<model>/photo.png ──claim──► inbox/<model>/.work/<job_id>__photo.png
        ──job ends──► line in outbox/<model>/results-YYYY-MM-DD.jsonl, flushed
        ──rename──►  inbox/<model>/done/photo.png, or failed/ with a reason file

The place of the input file is the state: a file in `.work` is not delivered
yet. Whenever a file is found there that is not known to be under way (after a
crash at any step, or on a stick that is back), it goes on from what the ledger
and the results file say; so no result is lost or repeated.

What is wrong with one folder (not readable, read-only, full, gone) holds up no
other folder. It is logged once when it begins and once when it is over.

A file is complete when nobody has it open for writing (a kernel lease tells,
on a local Linux file system) and it has not changed for `settle_s`.
Names that begin with a dot or end in .part, .tmp or ~ are never taken.

Source: docs/operate.md, "Batch folders".
"""

import fcntl
import json
import logging
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from agent.clock import Clock, format_ms
from agent.commands import (
    CANCEL,
    SUBMIT,
    TRUST,
    UPDATE,
    Envelope,
    SubmitBody,
    decode_envelope,
    encode_body,
    hash_text,
    new_id,
    parse_submit,
)
from agent.config import Settings
from agent.daemon.intake import refuse
from agent.daemon.messages import Message, Released, Spooled
from agent.errors import (
    AgentError,
    CommandError,
    MalformedError,
    ModelNotFoundError,
    ReleaseError,
)
from agent.faults import reach
from agent.fileio import append_line, fsync_dir, write_atomic
from agent.jobs import ENDS, JobState, Source
from agent.release import BUNDLES, find_bundled
from agent.store.ledger import EndedJob, NewJob
from agent.topics import JOB_ID_PATTERN

log = logging.getLogger(__name__)

WORK = ".work"
DONE = "done"
FAILED = "failed"
COMMANDS = "_commands"
_RESERVED = {WORK, DONE, FAILED}
_PARTIAL_SUFFIXES = (".part", ".partial", ".tmp", ".crdownload", "~")
_SEPARATOR = "__"
# Bounded, so that a folder of a million files neither floods the ledger nor blocks the scan.
_CLAIMS_PER_SCAN = 256
_WORKING_MAX = 2048
# 255 is the file systems' limit; the id, the separator and ".reason.json" come on top.
_NAME_BYTES = 200

BuildJob = Callable[[Envelope, SubmitBody, str, str, Source, float | None], NewJob]
ReadJobs = Callable[[Sequence[str]], dict[str, dict[str, Any]]]


class Inbox(threading.Thread):
    """Watches the inbox and delivers results.

    Args:
        settings: folders and times.
        clock: wall time.
        build_job: intake's check of a job.
        read_jobs: returns ledger rows by id.
        post: puts a message into the writer's mailbox.
    """

    def __init__(
        self,
        settings: Settings,
        clock: Clock,
        build_job: BuildJob,
        read_jobs: ReadJobs,
        post: Callable[[Message], None],
    ) -> None:
        super().__init__(name="inbox", daemon=True)
        self._settings = settings
        self._clock = clock
        self._build_job = build_job
        self._read_jobs = read_jobs
        self._post = post
        self._inbox = settings.inbox_dir
        self._outbox = settings.outbox_dir
        self._stopping = threading.Event()
        self._wake = threading.Event()
        self._working: dict[str, Path] = {}
        self._submitted: set[str] = set()
        self._written: set[str] = set()
        self._seen: dict[Path, tuple[int, int, int]] = {}
        self._ended: deque[str] = deque()
        self._is_recovered = False
        self._trouble: dict[Path, str] = {}
        """What is wrong with which folder in this turn; `_told` is what the log says already."""
        self._told: dict[Path, str] = {}
        self.turns = 0

    def list_undelivered(self) -> list[str] | None:
        """Return the jobs whose files wait for their result; None before that is known."""
        return list(self._working) if self._is_recovered else None

    def notify_ended(self, ended: Iterable[EndedJob]) -> None:
        """Take note of folder jobs that ended; called by the writer after its commit."""
        mine = [job.job_id for job in ended if job.source is Source.FOLDER]
        if mine:
            self._ended.extend(mine)
            self._wake.set()

    def run(self) -> None:
        """Scan and deliver until stopped."""
        while not self._stopping.is_set():
            try:
                if not self._is_recovered:
                    self._recover()
                    self._is_recovered = True
                self._turn()
            except (OSError, TimeoutError) as exc:
                self._note(self._inbox, exc)
            self._tell_trouble()
            self.turns += 1
            self._wake.wait(self._settings.inbox.scan_s)
            self._wake.clear()

    def _turn(self) -> None:
        self._deliver_ended()
        for path in self._iter_commands():
            self._attempt(path, self._take_command)
        for path in self._find_complete():
            self._attempt(path, self._claim)
        self._adopt()
        self._submit_claimed()

    def _attempt(self, path: Path, take: Callable[[Path], None]) -> None:
        """Take one file; one that cannot be taken must not hold up the others."""
        try:
            take(path)
        except OSError as exc:
            self._note(path.parent, exc)

    def _note(self, folder: Path, exc: OSError) -> None:
        """Take note of what is wrong with a folder; the first of a turn stands for all."""
        self._trouble.setdefault(folder, exc.strerror or str(exc) or type(exc).__name__)

    def _tell_trouble(self) -> None:
        """Log what has begun and what is over since the last turn."""
        trouble, self._trouble = self._trouble, {}
        for folder, text in trouble.items():
            if folder not in self._told:
                log.warning(
                    "%s: %s; trying again every %g s", folder, text, self._settings.inbox.scan_s
                )
        for folder in self._told.keys() - trouble.keys():
            log.info("%s: served again", folder)
        self._told = trouble

    # --- from file to job ------------------------------------------------------------------

    def _iter_models(self) -> Iterator[Path]:
        for folder in sorted(self._inbox.iterdir()):
            if folder.name[0] in "._" and folder.name != BUNDLES:
                continue
            try:
                is_folder = folder.is_dir() and not folder.is_symlink()
            except OSError as exc:
                self._note(folder, exc)
                continue
            if is_folder:
                yield folder

    def _find_complete(self) -> list[Path]:
        """Return files that have not changed for `settle_s` and that nobody writes."""
        now_ms = self._clock.boot_ms()
        complete: list[Path] = []
        seen: dict[Path, tuple[int, int, int]] = {}
        for path, stat in self._iter_files():
            size, changed, since = self._seen.get(path, (-1, -1, now_ms))
            if (size, changed) != (stat.st_size, stat.st_mtime_ns):
                since = now_ms
            seen[path] = (stat.st_size, stat.st_mtime_ns, since)
            settled = now_ms - since >= self._settings.inbox.settle_s * 1000
            room = len(complete) < _CLAIMS_PER_SCAN and len(self._working) < _WORKING_MAX
            if settled and room and not is_being_written(path):
                complete.append(path)
        self._seen = seen
        return complete

    def _iter_files(self) -> Iterator[tuple[Path, os.stat_result]]:
        for model in self._iter_models():
            try:
                files = _list_files(model)
            except OSError as exc:
                self._note(model, exc)
                continue
            yield from files

    def _claim(self, path: Path) -> None:
        """Move a complete file to `.work`, under a new job's id; set a nameless one aside.

        A name that is no UTF-8, or too long for the id before it, can be neither
        a job's input nor a result's file name.
        """
        job_id = new_id()
        work = path.parent / WORK
        work.mkdir(exist_ok=True)
        encoded = os.fsencode(path.name)
        if len(encoded) > _NAME_BYTES or not _is_utf8(encoded):
            _set_aside(path, job_id)
            return
        claimed = work / f"{job_id}{_SEPARATOR}{path.name}"
        path.rename(claimed)
        fsync_dir(work)
        reach("inbox.claimed")
        self._working[job_id] = claimed

    def _submit_claimed(self) -> None:
        for job_id in [key for key in self._working if key not in self._submitted]:
            self._submit(job_id, self._working[job_id])

    def _submit(self, job_id: str, path: Path) -> None:
        self._submitted.add(job_id)
        if path.parent.parent.name == BUNDLES:
            job = self._build_update(job_id, path)
        else:
            body = {
                "handler": "infer.batch",
                "job_id": job_id,
                "model": path.parent.parent.name,
                "input": {"file": str(path.relative_to(self._inbox))},
            }
            envelope = Envelope(v=1, id=job_id, type=SUBMIT, body=body)
            job = self._check(envelope, job_id, Source.FOLDER)
        self._post(Spooled(Source.FOLDER, job=job))
        reach("inbox.submitted")
        if job.state in ENDS:
            # Refused at the door: nothing will call when it ends, so look after the commit.
            self._post(Spooled(Source.FOLDER, done=lambda: self._notice(job_id)))

    def _build_update(self, job_id: str, path: Path) -> NewJob:
        """Return the update job of a bundle file; what it says of itself, a worker verifies."""
        try:
            model, version = find_bundled(path)
        except ReleaseError as exc:
            return refuse(job_id, Source.FOLDER, exc, hash_text(path.name))
        body = {
            "handler": UPDATE,
            "job_id": job_id,
            "model": model,
            "version": version,
            "params": {"bundle": str(path.relative_to(self._inbox / BUNDLES))},
        }
        envelope = Envelope(v=1, id=job_id, type=SUBMIT, body=body)
        return self._check(envelope, job_id, Source.FOLDER)

    def _notice(self, job_id: str) -> None:
        self._ended.append(job_id)
        self._wake.set()

    def _check(self, envelope: Envelope, job_id: str, source: Source) -> NewJob:
        text = ""
        try:
            text = encode_body(envelope.body)
            submit = parse_submit(envelope, job_id)
            return self._build_job(envelope, submit, job_id, text, source, None)
        except (CommandError, ModelNotFoundError) as exc:
            return refuse(job_id, source, exc, hash_text(text), text)

    # --- local commands ----------------------------------------------------------------------

    def _iter_commands(self) -> list[Path]:
        return sorted(path for path in (self._inbox / COMMANDS).glob("*.json") if path.is_file())

    def _take_command(self, path: Path) -> None:
        """Take a submit or a cancel that the command line left; it is removed after the commit."""
        try:
            envelope = decode_envelope(path.read_bytes(), self._settings.limits.payload_bytes)
            if envelope.type == TRUST:
                message: Message = self._read_trust(envelope, path)
            else:
                message = self._read_job_command(envelope, path)
        except AgentError as exc:
            log.warning("command %s refused: %s (%s)", path.name, exc, exc.code)
            path.rename(path.with_suffix(f".{exc.code}"))
            return
        path.rename(path.with_suffix(".taken"))
        reach("spool.taken")
        self._post(message)
        reach("spool.posted")

    def _read_trust(self, envelope: Envelope, path: Path) -> Released:
        model, version = envelope.body.get("model"), envelope.body.get("version")
        if not isinstance(model, str) or not isinstance(version, str):
            msg = f"{path.name}: body.model and body.version are texts"
            raise MalformedError(msg)
        return Released(model, version, lambda: _remove_taken(path))

    def _read_job_command(self, envelope: Envelope, path: Path) -> Spooled:
        job_id = str(envelope.body.get("job_id", ""))
        if not JOB_ID_PATTERN.fullmatch(job_id):
            msg = f"{path.name}: body.job_id is no ULID"
            raise MalformedError(msg)
        return self._read_command(envelope, job_id, path)

    def _read_command(self, envelope: Envelope, job_id: str, path: Path) -> Spooled:
        remove = partial(_remove_taken, path)
        if envelope.type == CANCEL:
            return Spooled(Source.LOCAL, cancel=job_id, done=remove)
        job = self._check(envelope, job_id, Source.LOCAL)
        return Spooled(Source.LOCAL, job=job, done=remove)

    # --- from job to result --------------------------------------------------------------------

    def _deliver_ended(self) -> None:
        waiting = list(self._ended)
        # Read before they are taken off: where the store does not answer, they stay.
        rows = self._read_jobs(waiting) if waiting else {}
        stuck: set[Path] = set()
        for job_id in waiting:
            self._ended.popleft()
            path, row = self._working.get(job_id), rows.get(job_id)
            if path is None or row is None or row["state"] not in ENDS:
                continue
            if path.parent in stuck:
                # One write to a full disk a turn tells enough.
                self._ended.append(job_id)
                continue
            try:
                self._deliver_one(job_id, path, row)
            except OSError as exc:
                stuck.add(path.parent)
                self._note(Path(exc.filename or self._outbox / path.parent.parent.name), exc)
                self._ended.append(job_id)

    def _deliver_one(self, job_id: str, path: Path, row: dict[str, Any]) -> None:
        name = path.name.partition(_SEPARATOR)[2]
        model = path.parent.parent
        if row["state"] == JobState.SUCCEEDED:
            if job_id not in self._written:
                append_line(self._results_file(model.name, row), _result_line(name, row))
                self._written.add(job_id)
                reach("inbox.delivered")
            target = choose_target(model / DONE, name, job_id) if path.exists() else path
        elif not path.parent.is_dir():
            # Its stick was pulled: this goes on when it is back. Nothing is written into the
            # empty folder that it leaves.
            target = path
        else:
            target = choose_target(model / FAILED, name, job_id)
            write_atomic(target.with_name(target.name + ".reason.json"), _reason_text(name, row))
            reach("inbox.explained")
        if path.exists():
            path.rename(target)
            fsync_dir(target.parent)
            reach("inbox.moved")
        else:
            log.warning("%s was taken away while its job ran", path)
        self._working.pop(job_id, None)
        self._written.discard(job_id)
        self._submitted.discard(job_id)

    def _results_file(self, model: str, row: dict[str, Any]) -> Path:
        day = format_ms(row["ended_ms"])[:10]
        return self._outbox / model / f"results-{day}.jsonl"

    # --- after a crash -----------------------------------------------------------------------

    def _recover(self) -> None:
        """Go on from where the last run stopped: what is in `.work` is not delivered."""
        commands = self._inbox / COMMANDS
        try:
            commands.mkdir(parents=True, exist_ok=True)
        except OSError as exc:
            # A folder below may be another disk, and writable.
            self._note(commands, exc)
        for taken in commands.glob("*.taken"):
            self._attempt(taken, lambda path: _rename_to(path, ".json"))
        self._adopt()
        if self._working:
            log.info("inbox: %d files were under way", len(self._working))

    def _adopt(self) -> None:
        """Take over what is in `.work` and not known to be under way.

        It is there after a crash, after an error in the middle of a claim, and when a
        stick is back that was pulled.
        """
        found = {job_id: path for job_id, path in self._iter_work() if job_id not in self._working}
        if not found:
            return
        rows = self._read_jobs(list(found))
        delivered: dict[Path, set[str]] = {}
        for job_id, path in found.items():
            row = rows.get(job_id)
            if row is not None and row["state"] in ENDS:
                file = self._results_file(path.parent.parent.name, row)
                try:
                    if file not in delivered:
                        delivered[file] = read_delivered(file)
                except OSError as exc:
                    # Without it nobody knows what was delivered: later.
                    self._note(file, exc)
                    continue
                self._written |= delivered[file] & {job_id}
                self._ended.append(job_id)
            # Without a row the crash came before the commit: it is submitted again.
            self._working[job_id] = path
            if row is not None:
                self._submitted.add(job_id)

    def _iter_work(self) -> Iterator[tuple[str, Path]]:
        for model in self._iter_models():
            work = model / WORK
            try:
                paths = sorted(work.iterdir())
            except FileNotFoundError:
                continue
            except OSError as exc:
                self._note(model, exc)
                continue
            for path in paths:
                job_id, separator, _ = path.name.partition(_SEPARATOR)
                if separator and JOB_ID_PATTERN.fullmatch(job_id):
                    yield job_id, path

    def stop(self) -> None:
        """End the thread."""
        self._stopping.set()
        self._wake.set()
        self.join(5.0)


def _list_files(folder: Path) -> list[tuple[Path, os.stat_result]]:
    """Return the files of a folder that may be complete, by name.

    What is taken away while it looks is left out.
    """
    found: list[tuple[Path, os.stat_result]] = []
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda item: item.name):
            partial_name = entry.name.startswith(".") or entry.name.endswith(_PARTIAL_SUFFIXES)
            with suppress(FileNotFoundError):
                if not partial_name and entry.is_file(follow_symlinks=False):
                    found.append((Path(entry.path), entry.stat(follow_symlinks=False)))
    return found


def _rename_to(path: Path, suffix: str) -> None:
    path.rename(path.with_suffix(suffix))


def _remove_taken(path: Path) -> None:
    """Remove a command whose effect is committed."""
    path.with_suffix(".taken").unlink(missing_ok=True)
    reach("spool.removed")


def _is_utf8(name: bytes) -> bool:
    try:
        name.decode()
    except UnicodeDecodeError:
        return False
    return True


def _set_aside(path: Path, job_id: str) -> None:
    """Move a file with an unusable name to `failed/` under an id, with the reason beside it."""
    target = choose_target(path.parent / FAILED, job_id, job_id)
    body = {
        "file": path.name.encode("utf-8", "backslashreplace").decode(),
        "code": "bad_file_name",
        "message": f"a name must be UTF-8 of at most {_NAME_BYTES} bytes; rename it",
    }
    write_atomic(target.with_name(f"{job_id}.reason.json"), json.dumps(body, indent=2) + "\n")
    path.rename(target)
    fsync_dir(target.parent)


def is_being_written(path: Path) -> bool:
    """Say whether some process has a file open for writing.

    Takes a read lease, which Linux grants only where nobody writes. Where it
    cannot tell (another file system, not our file), it says no, and the time a
    file stays unchanged decides.

    Source: fcntl(2), F_SETLEASE.
    """
    if not hasattr(fcntl, "F_SETLEASE"):
        return False
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return True
    try:
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_RDLCK)
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(fd)
    return False


def read_delivered(file: Path) -> set[str]:
    """Return the job ids in a results file, after cutting off a line that was torn by a crash."""
    if not file.exists():
        return set()
    with file.open("rb+") as stream:
        content = stream.read()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            stream.truncate(whole)
            os.fsync(stream.fileno())
    return {job_id for line in content[:whole].splitlines() if (job_id := _find_job_id(line))}


def _find_job_id(line: bytes) -> str | None:
    """Return the job id of a line, or None for a line that somebody else wrote."""
    try:
        job_id = json.loads(line)["job_id"]
    except (ValueError, KeyError, TypeError):
        return None
    return str(job_id)


def choose_target(folder: Path, name: str, job_id: str) -> Path:
    """Return where `name` goes in `folder`: with the job's id before it where it is taken."""
    folder.mkdir(exist_ok=True)
    target = folder / name
    return folder / f"{job_id}{_SEPARATOR}{name}" if target.exists() else target


def _result_line(name: str, row: dict[str, Any]) -> str:
    result = json.loads(row["result"] or "{}")
    # The id also where the result was forgotten since: by it a line is known to be delivered.
    head = {"file": name, "state": row["state"], "job_id": row["job_id"]}
    return json.dumps(head | result, ensure_ascii=False)


def _reason_text(name: str, row: dict[str, Any]) -> str:
    body = {
        "file": name,
        "job_id": row["job_id"],
        "state": row["state"],
        "code": row["reason_code"],
        "message": row["reason"],
        "attempts": row["attempt"],
        "ended_at": format_ms(row["ended_ms"]),
    }
    return json.dumps(body, indent=2, ensure_ascii=False) + "\n"
