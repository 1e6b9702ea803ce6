"""The demo: one box, two real models, a broker that goes away and a worker that is killed.

Owns the story and its checks. Everything it shows is the product at work: the processes
of `edgeward up`, commands over MQTT as any console sends them, files in an inbox; it looks
at the results where a user would look. It runs in a folder of its own and leaves nothing
behind, unless a step failed or `--keep` was given.
"""

import json
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from agent.clock import SystemClock
from agent.config import ENV_PREFIX, Settings, load_settings
from agent.jobs import ENDS, JobState
from agent.logs import set_up_logs
from agent.repository import ModelRepository
from console.children import Children
from console.demo_files import RealFile, drop_file, find_real_files
from console.embedded import MqttBrokerKind, find_free_port
from console.errors import DemoStepError
from console.exits import EXPECTED_ERRORS, Exit, code_of
from console.ledger_view import LedgerView, Row, view_ledger
from console.link import ConsoleLink
from console.models.magika import write_magika_version
from console.models.samples import DigitSample, write_digit_samples
from console.output import Output, build_table
from console.submission import Command, Wanted, build_submit, read_input
from console.up import MQTT, WORKER, add_children, hold_box, plan_box

DIGITS, MAGIKA = "digits", "magika"
_DIGITS_FOLDER = Path(__file__).parent / "models" / DIGITS
_PICTURES = 40
_FILES_AT_KILL = 200
"""So many that the worker is busy when the first answer comes."""
_SMALL_BYTES = 60_000
_FILES, _FILES_OFFLINE = 24, 16
_MIN_RIGHT = 0.95
"""Of the answers; the committed models reach 0.98 and more on what they have not seen."""
_STEP_LIMIT_S = 30.0
_CONSOLE_RETRY_S = 0.01
"""Sooner than the agent tries again: results are not retained, and a broker that has lost
its sessions drops those that come before the console has subscribed again."""
_POLL_S = 0.05
_SETTINGS = """\
# A box for show: it looks for files and for its broker more often than one in the field.
[inbox]
settle_s = 0.2
scan_s = 0.2

[mqtt]
reconnect_min_s = 0.2
reconnect_max_s = 2.0
"""


@dataclass
class Group:
    """Jobs that the last table sums up in one line."""

    title: str
    job_ids: list[str] = field(default_factory=list)
    late: int = 0
    """Reports that were written while no broker was there, and arrived all the same."""


@dataclass(frozen=True)
class StepReport:
    """How one step went."""

    title: str
    passed: bool
    took_s: float
    detail: str


class Demo:
    """The box of the demo and what is known about it; `steps` is the story.

    Args:
        settings: the demo's own.
        children: the processes, none of them started.
        stack: what has to be closed at the end.
        work_dir: for pictures and model versions.
    """

    def __init__(
        self, settings: Settings, children: Children, stack: ExitStack, work_dir: Path
    ) -> None:
        self._settings = settings
        self._children = children
        self._stack = stack
        self._work_dir = work_dir
        self._samples: list[DigitSample] = []
        self._files: list[RealFile] = []
        self._old = set(self._read_delivered())
        self._offline_since_ms = 0
        self._link: ConsoleLink | None = None
        self.groups: dict[str, Group] = {}

    def steps(self) -> list[tuple[str, Callable[[], str]]]:
        """Return the story: what each step shows, and what does it and returns the detail."""
        return [
            ("start brokers, agent and worker", self.start_box),
            ("install two models", self.install_models),
            (f"send {_PICTURES} pictures of digits over MQTT", self.send_pictures),
            (f"drop {_FILES} files into the inbox of magika", self.drop_files),
            ("kill the worker with jobs under way", self.kill_worker),
            ("stop the MQTT broker", self.stop_broker),
            (f"drop {_FILES_OFFLINE} more files: work goes on offline", self.work_offline),
            ("start the broker again: the reports arrive", self.return_online),
            ("compare ledger, results and console", self.compare),
            ("stop everything", self.stop_box),
        ]

    # --- the story ---------------------------------------------------------------------------

    def start_box(self) -> str:
        """Start every process and connect a console."""
        self._children.start()
        self._link = link = self._stack.enter_context(ConsoleLink(self._settings, _CONSOLE_RETRY_S))
        link.follow_all()
        _expect(
            link.wait(lambda: link.device_state == "online", _STEP_LIMIT_S),
            "the device did not come online",
        )
        return f"device {self._settings.device_id} is online"

    def install_models(self) -> str:
        """Add both models to the repository, the second one from its Python package."""
        repository = ModelRepository(self._settings.models_dir)
        write_magika_version(self._work_dir / MAGIKA)
        added = [repository.add(_DIGITS_FOLDER), repository.add(self._work_dir / MAGIKA)]
        self._samples = write_digit_samples(self._work_dir / "pictures", _PICTURES)
        self._files = find_real_files([sample.path for sample in self._samples])
        return ", ".join(f"{item.name} {item.release}" for item in added)

    def send_pictures(self) -> str:
        """Submit pictures as a console does, and check the answers."""
        paths = [sample.path for sample in self._samples]
        answers = self._await_answers(self._submit("pictures (MQTT)", DIGITS, paths))
        return _judge("digits read right", answers, [str(item.label) for item in self._samples])

    def drop_files(self) -> str:
        """Let files become jobs by being there."""
        return self._judge_files(self._drop("files (inbox)", self._files[:_FILES]))

    def kill_worker(self) -> str:
        """Kill the worker in the middle of its work; its supervisor starts it again."""
        small = [file for file in self._files if file.path.stat().st_size <= _SMALL_BYTES]
        files = (small * _FILES_AT_KILL)[:_FILES_AT_KILL]
        commands = self._submit("worker killed", MAGIKA, [file.path for file in files])
        link = self._get_link()
        link.wait(lambda: any(link.jobs[item.job_id].is_complete for item in commands), 10.0)
        os.kill(self._find_pid(WORKER), signal.SIGKILL)
        answers = self._await_answers(commands)
        with view_ledger(self._settings) as ledger:
            rows = ledger.find_jobs([item.job_id for item in commands])
        again = sum(row["attempt"] > 1 for row in rows.values())
        right = _judge("files recognised", answers, [file.label for file in files])
        return f"{again} jobs ran again; {right}"

    def stop_broker(self) -> str:
        """Take the MQTT broker away."""
        self._children.stop_child(MQTT)
        self._offline_since_ms = SystemClock().wall_ms()
        return "the box is on its own"

    def work_offline(self) -> str:
        """Let files be worked on while nobody can be told."""
        lines = self._drop("files, offline", self._files[_FILES : _FILES + _FILES_OFFLINE])
        with view_ledger(self._settings) as ledger:
            waiting = ledger.count_unreported()
        _expect(waiting >= len(lines), f"only {waiting} reports wait in the outbox")
        return f"{self._judge_files(lines)}; {waiting} reports wait"

    def return_online(self) -> str:
        """Bring the broker back, which has forgotten everything, and see the reports come."""
        self._children.start_child(MQTT)
        back_ms = SystemClock().wall_ms()
        group, link = self.groups["files, offline"], self._get_link()

        def late() -> list[int]:
            jobs = [link.jobs[key] for key in group.job_ids if key in link.jobs]
            return [
                job.received_ms - job.reported_ms
                for job in jobs
                if job.has_ended and job.received_ms and job.reported_ms
                if job.reported_ms < back_ms
            ]

        link.wait(lambda: len(late()) == len(group.job_ids), _STEP_LIMIT_S)
        # Results follow the states that end their jobs.
        link.wait(lambda: all(link.jobs[key].is_complete for key in group.job_ids), 5.0)
        delays = late()
        group.late = len(delays)
        _expect(group.late == len(group.job_ids), f"{group.late} of them arrived")
        results = sum(link.jobs[key].result is not None for key in group.job_ids)
        slowest_s = max(delays) / 1000
        return f"{group.late} late reports, {results} results, up to {slowest_s:.1f} s late"

    def compare(self) -> str:
        """Check that nothing was lost and nothing doubled."""
        ids = [job_id for group in self.groups.values() for job_id in group.job_ids]
        jobs = self._get_link().jobs
        with view_ledger(self._settings) as ledger:
            rows = ledger.find_jobs(ids)
            waiting = _await_empty_outbox(ledger)
        _expect(len(rows) == len(set(ids)) == len(ids), f"{len(rows)} of {len(ids)} in the ledger")
        other = [row["job_id"] for row in rows.values() if row["state"] != JobState.SUCCEEDED]
        _expect(not other, f"these did not succeed: {', '.join(other[:3])}")
        differ = [key for key in ids if jobs[key].state != rows[key]["state"]]
        _expect(not differ, f"the console knows another state of {', '.join(differ[:3])}")
        lines = [line["job_id"] for line in self._read_lines()]
        _expect(len(lines) == len(set(lines)), "a result was delivered twice")
        return f"{len(ids)} jobs, each ended once and is known to the console; {waiting} unsent"

    def stop_box(self) -> str:
        """End every process, and see that none is left."""
        if self._link is not None:
            self._link.close()
        self._children.stop()
        left = [state.name for state in self._children.state() if state.pid is not None]
        _expect(not left, f"still running: {', '.join(left)}")
        return "nothing is left running"

    # --- what the steps share ------------------------------------------------------------------

    def _get_link(self) -> ConsoleLink:
        if self._link is None:
            raise DemoStepError("the console is not connected")
        return self._link

    def _find_pid(self, name: str) -> int:
        pid = next(state.pid for state in self._children.state() if state.name == name)
        if pid is None:
            raise DemoStepError(f"{name} does not run")
        return pid

    def _submit(self, title: str, model: str, paths: Sequence[Path]) -> list[Command]:
        wanted = Wanted(model)
        commands = [build_submit(wanted, read_input(path), path.name) for path in paths]
        self.groups[title] = Group(title, [item.job_id for item in commands])
        self._get_link().submit(commands)
        return commands

    def _await_answers(self, commands: Sequence[Command]) -> list[str]:
        """Return the best label of each job, once all have ended."""
        link = self._get_link()

        def count() -> int:
            jobs = link.jobs
            return sum(jobs[item.job_id].is_complete for item in commands)

        done = link.wait(lambda: count() == len(commands), _STEP_LIMIT_S)
        _expect(done, f"{count()} of {len(commands)} jobs ended in {_STEP_LIMIT_S:g} s")
        jobs = link.jobs
        return [_best_label(jobs[item.job_id].result or {}) for item in commands]

    def _judge_files(self, lines: Sequence[Row]) -> str:
        labels = {file.path.name: file.label for file in self._files}
        answers = [_best_label(line) for line in lines]
        right = _judge("files recognised", answers, [labels[line["file"]] for line in lines])
        return f"{right}: {', '.join(sorted(set(answers)))}"

    def _drop(self, title: str, files: Sequence[RealFile]) -> list[Row]:
        """Drop files and return their lines of the results file, once all are there."""
        before = set(self._read_delivered())
        for file in files:
            drop_file(file.path, self._settings.inbox_dir / MAGIKA)
        deadline = time.monotonic() + _STEP_LIMIT_S
        while len(self._read_delivered()) < len(before) + len(files):
            if time.monotonic() >= deadline:
                got = len(self._read_delivered()) - len(before)
                raise DemoStepError(f"{got} of {len(files)} results in {_STEP_LIMIT_S:g} s")
            time.sleep(_POLL_S)
        lines = [line for line in self._read_lines() if line["job_id"] not in before]
        self.groups[title] = Group(title, [line["job_id"] for line in lines])
        return lines

    def _read_delivered(self) -> list[str]:
        return [line["job_id"] for line in _read_results(self._settings.outbox_dir / MAGIKA)]

    def _read_lines(self) -> list[Row]:
        lines = _read_results(self._settings.outbox_dir / MAGIKA)
        return [line for line in lines if line["job_id"] not in self._old]

    # --- the last table ------------------------------------------------------------------------

    def summarise(self) -> list[dict[str, Any]]:
        """Return a line for each group of jobs; times from acceptance to the end."""
        if not self._settings.ledger_file.exists():
            return []
        with view_ledger(self._settings) as ledger:
            return [_sum_up(group, ledger) for group in self.groups.values()]


def _expect(holds: bool, message: str) -> None:
    """Fail the step where something does not hold.

    Raises:
        DemoStepError: it does not.
    """
    if not holds:
        raise DemoStepError(message)


def _read_results(folder: Path) -> Iterator[Row]:
    for path in sorted(folder.glob("results-*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
            # The last line may be half written just now.
            if line.endswith("\n"):
                yield json.loads(line)


def _judge(what: str, answers: Sequence[str], wanted: Sequence[str]) -> str:
    """Return how many answers are right, in words.

    Raises:
        DemoStepError: too few are.
    """
    right = sum(answer == label for answer, label in zip(answers, wanted, strict=True))
    text = f"{right} of {len(wanted)} {what}"
    _expect(right >= _MIN_RIGHT * len(wanted), f"only {text}")
    return text


def _best_label(result: Row) -> str:
    output = result.get("output")
    return str(output[0]["label"]) if isinstance(output, list) and output else ""


def _await_empty_outbox(ledger: LedgerView, timeout_s: float = 5.0) -> int:
    """Return how many records are unsent, once there are none or the time is over."""
    deadline = time.monotonic() + timeout_s
    while (waiting := ledger.count_unreported()) and time.monotonic() < deadline:
        time.sleep(_POLL_S)
    return waiting


def _sum_up(group: Group, ledger: LedgerView) -> dict[str, Any]:
    rows = list(ledger.find_jobs(group.job_ids).values())
    spans = sorted(row["ended_ms"] - row["created_ms"] for row in rows if row["state"] in ENDS)
    return {
        "what": group.title,
        "jobs": len(group.job_ids),
        "succeeded": sum(row["state"] == JobState.SUCCEEDED for row in rows),
        "ran_again": sum(row["attempt"] > 1 for row in rows),
        "p50_ms": pick_percentile(spans, 0.50),
        "p95_ms": pick_percentile(spans, 0.95),
        "reported_late": group.late,
    }


def pick_percentile(ordered: Sequence[int], share: float) -> int | None:
    """Return the value that `share` of the sorted values do not exceed (nearest rank)."""
    if not ordered:
        return None
    return ordered[max(0, -int(-len(ordered) * share // 1) - 1)]


# --- running it ---------------------------------------------------------------------------------


def run_demo(
    out: Output, data_dir: Path | None, kind: MqttBrokerKind | None, *, keep: bool
) -> Exit:
    """Tell the story step by step; return 0 where every step passed, else 1.

    Raises:
        AlreadyUpError: an `edgeward up` runs on the folder that was given.
        BrokerMissingError: a broker is not installed.
    """
    # The demo is a box of its own: what is set for this machine's box is not for it.
    for name in [name for name in os.environ if name.startswith(ENV_PREFIX)]:
        del os.environ[name]
    # What it does to its processes would be reported as trouble.
    set_up_logs("error", as_json=False)
    with _own_folder(data_dir) as folder:
        reports, total, summary = _tell(out, folder, kind)
        passed = sum(report.passed for report in reports)
        if data_dir is None and not keep and passed == total:
            shutil.rmtree(folder, ignore_errors=True)
        else:
            out.write(f"\nlogs: {folder / 'log'}")
        _show_end(out, reports, total, summary)
    return Exit.OK if passed == total else Exit.ERROR


@contextmanager
def _own_folder(given: Path | None) -> Iterator[Path]:
    folder = (given or Path(tempfile.mkdtemp(prefix="edgeward-demo-"))).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield folder
    except (KeyboardInterrupt, *EXPECTED_ERRORS):
        if given is None:
            shutil.rmtree(folder, ignore_errors=True)
        raise


def _tell(
    out: Output, folder: Path, kind: MqttBrokerKind | None
) -> tuple[list[StepReport], int, list[dict[str, Any]]]:
    config = folder / "demo.toml"
    config.write_text(_SETTINGS, encoding="utf-8")
    port = find_free_port()
    settings = load_settings(
        config, {"data_dir": folder, "device_id": "demo", "mqtt": {"port": port}}
    )
    with ExitStack() as stack:
        stack.enter_context(hold_box(settings.runtime_dir))
        plan = plan_box(settings, config, kind)
        children = stack.enter_context(add_children(plan, folder / "log"))
        work_dir = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="edgeward-demo-")))
        demo = Demo(settings, children, stack, work_dir)
        steps = demo.steps()
        reports = list(_run_steps(out, steps))
        summary = demo.summarise()
    return reports, len(steps), summary


def _run_steps(out: Output, steps: Sequence[tuple[str, Callable[[], str]]]) -> Iterator[StepReport]:
    """Run the steps up to the first that fails."""
    for number, (title, act) in enumerate(steps, 1):
        began = time.monotonic()
        try:
            with out.spinner(f"{number}/{len(steps)} {title}"):
                detail, passed = act(), True
        except (*EXPECTED_ERRORS, OSError) as exc:
            detail, passed = f"{exc} [{code_of(exc)}]", False
        report = StepReport(title, passed, time.monotonic() - began, detail)
        _show_step(out, number, len(steps), report)
        yield report
        if not passed:
            return


def _show_step(out: Output, number: int, total: int, report: StepReport) -> None:
    from rich.text import Text

    mark, colour = ("✓", "green") if report.passed else ("✗", "red")
    line = Text.assemble(
        (f"{mark} ", colour),
        (f"{number:>2}/{total}  ", "dim"),
        (f"{report.title:<52}", "bold"),
        (f"{report.took_s:6.1f} s", "cyan"),
        f"\n        {report.detail}",
    )
    out.write(line)


def _show_end(
    out: Output, reports: Sequence[StepReport], total: int, summary: list[dict[str, Any]]
) -> None:
    from dataclasses import asdict

    passed = sum(report.passed for report in reports)
    document = {
        "passed": passed,
        "steps": total,
        "reports": [asdict(report) for report in reports],
        "summary": summary,
    }
    headers = ("", "Jobs", "Succeeded", "Ran again", "p50 ms", "p95 ms", "Reported late")
    if summary:
        out.write("")
    out.show(document, lambda: build_table(headers, [tuple(row.values()) for row in summary]))
    took_s = sum(report.took_s for report in reports)
    out.write(f"\n{took_s:.1f} s in all\ndemo: {passed} of {total} steps passed")
