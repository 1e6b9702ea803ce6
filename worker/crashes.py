"""What a worker finds of predecessors in its slot that died, and tells the agent.

Evidence of a crash is a trace that `faulthandler` wrote, or that the kernel's
out-of-memory counter grew. The trace names the thread that crashed, and the
journal what that thread was at: only those jobs are named. Where no thread is
named (a runtime's own thread, out of memory) it is what was at work, if that was
one task. Were it several, none of their jobs is named: a job that happened to
run beside a poisonous one, twice, would be taken for poison too. And while its
model loads no job is to blame, only the model version. A death without
evidence, such as SIGKILL from outside, is nobody's fault.

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
    jobs: tuple[tuple[str, int], ...]
    """Ids and attempts of the jobs whose fault it was; none where that cannot be told."""
    counts: bool
    """Whether it was this model version's fault, and no other message says so."""


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
    if culprit is not None:
        records = [record for record in records if record.thread == culprit]
    is_same_model = len({(record.model, record.version) for record in records}) == 1
    return [
        Crash(
            signal,
            record,
            () if record.is_loading or len(records) > 1 else record.jobs,
            counts=is_same_model and not index,
        )
        for index, record in enumerate(records)
    ]


def find_death(dead: DeadJournal, boot: str, oom: OomCount) -> str | None:
    """Return the signal that a process of this boot died of; None where nothing shows any."""
    if dead.boot != boot:
        return None
    fatal = _FATAL.search(dead.trace)
    if fatal is not None:
        return _SIGNALS.get(fatal[1], fatal[1])
    return OOM if dead.oom.has_grown_until(oom) else None


def report_predecessors(
    folder: Path,
    boot: str,
    oom: OomCount,
    send: Callable[[Crash], None],
    send_death: Callable[[str, str], None],
) -> None:
    """Send what dead predecessors' files are evidence of, then remove the files.

    Stale files of other slots, from before the machine's last boot, go too.

    Args:
        folder: the slot's folder.
        boot: the machine's present boot.
        oom: the kernel's counters now.
        send: sends one message; what it raises leaves the files for the next start.
        send_death: sends the name of a process and its signal, where no task is to blame: it
            answered somebody at once, or nobody knows what it was at.
    """
    for path in _iter_journals(folder):
        with claim_journal(path) as dead:
            if dead is not None:
                crashes = find_crashes(dead, boot, oom)
                _log(dead, crashes)
                for crash in crashes:
                    send(crash)
                signal = find_death(dead, boot, oom)
                if signal is not None and not any(crash.counts for crash in crashes):
                    send_death(path.stem, signal)
                dead.remove()
    _sweep(folder.parent, boot)


def _log(dead: DeadJournal, crashes: Sequence[Crash]) -> None:
    if dead.trace:
        log.error("the worker before this one crashed; its trace:\n%s", dead.trace.rstrip())
    for crash in crashes:
        jobs = ", ".join(job_id for job_id, _ in crash.jobs or crash.record.jobs)
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
