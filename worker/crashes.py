"""What a worker finds of predecessors in its slot that died, and tells the agent.

Evidence of a crash is a trace that `faulthandler` wrote, or that the kernel's
out-of-memory counter grew. The trace names the thread that crashed, and the
journal what that thread was at: only those jobs are named. Where no thread is
named (a runtime's own thread, out of memory) it is whatever was at work. A
death without evidence, such as SIGKILL from outside, is nobody's fault.

Invariants: files are removed after their message was sent, so a reader that is
killed itself loses none (the agent tells duplicates by the attempt); a journal
of another boot of the machine is no evidence of anything.
"""

import logging
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from worker.journal import JOURNAL_SUFFIX, DeadJournal, RunRecord, claim_journal
from worker.oom import OomCount

log = logging.getLogger(__name__)

OOM = "oom"
# CPython's words for the signals, in Modules/faulthandler.c; 3.13 hyphenates one.
_SIGNALS = {
    "Segmentation fault": "SIGSEGV",
    "Floating point exception": "SIGFPE",
    "Floating-point exception": "SIGFPE",
    "Aborted": "SIGABRT",
    "Bus error": "SIGBUS",
    "Illegal instruction": "SIGILL",
}
_FATAL = re.compile(r"^Fatal Python error: (.+)$", re.M)
_CULPRIT = re.compile(r"^Current thread 0x([0-9a-f]+)", re.M)


@dataclass(frozen=True, slots=True)
class Crash:
    """One task that was at work when the process crashed."""

    signal: str
    record: RunRecord
    counts: bool
    """Whether it counts for the model version: one crash of a process does so once."""


def find_crashes(dead: DeadJournal, boot: str, oom: OomCount) -> Sequence[Crash]:
    """Return what a dead process's files say of its end; nothing where there is no evidence.

    Args:
        dead: its files.
        boot: the machine's present boot.
        oom: the kernel's counters now.
    """
    if dead.boot != boot:
        return ()
    fatal = _FATAL.search(dead.trace)
    if fatal is not None:
        signal = _SIGNALS.get(fatal[1], fatal[1])
        return _blame(signal, dead.records, _find_culprit(dead.trace))
    if dead.oom.has_grown_until(oom):
        return _blame(OOM, dead.records, None)
    return ()


def _find_culprit(trace: str) -> int | None:
    """Return the thread that crashed, or None where it is none of Python's."""
    found = _CULPRIT.search(trace)
    return int(found[1], 16) if found else None


def _blame(signal: str, records: Sequence[RunRecord], culprit: int | None) -> Sequence[Crash]:
    crashes: list[Crash] = []
    counted: set[tuple[str, str | None]] = set()
    for record in records:
        if culprit is None or record.thread == culprit:
            version = (record.model, record.version)
            crashes.append(Crash(signal, record, counts=version not in counted))
            counted.add(version)
    return crashes


def report_predecessors(
    folder: Path, boot: str, oom: OomCount, send: Callable[[Crash], None]
) -> None:
    """Send what dead predecessors' files are evidence of, then remove the files.

    Stale files of other slots, from before the machine's last boot, go too.

    Args:
        folder: the slot's folder.
        boot: the machine's present boot.
        oom: the kernel's counters now.
        send: sends one message; what it raises leaves the files for the next start.
    """
    for path in _iter_journals(folder):
        with claim_journal(path) as dead:
            if dead is not None:
                crashes = find_crashes(dead, boot, oom)
                _log(dead, crashes)
                for crash in crashes:
                    send(crash)
                dead.remove()
    _sweep(folder.parent, boot)


def _log(dead: DeadJournal, crashes: Sequence[Crash]) -> None:
    if dead.trace:
        log.error("the worker before this one crashed; its trace:\n%s", dead.trace.rstrip())
    for crash in crashes:
        jobs = ", ".join(job_id for job_id, _ in crash.record.jobs)
        model = f"{crash.record.model}/{crash.record.version}"
        log.error("%s while model %s ran jobs %s", crash.signal, model, jobs)


def _iter_journals(folder: Path) -> Iterator[Path]:
    if folder.is_dir():
        yield from sorted(folder.glob(f"*{JOURNAL_SUFFIX}"))


def _sweep(workers: Path, boot: str) -> None:
    """Remove what processes of earlier boots left in slots that nobody serves any more."""
    if not workers.is_dir():
        return
    for folder in workers.iterdir():
        for path in _iter_journals(folder):
            with claim_journal(path) as dead:
                if dead is not None and dead.boot != boot:
                    dead.remove()
