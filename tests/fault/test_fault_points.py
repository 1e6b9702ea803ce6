"""The box ends at every fault point, by SIGKILL, and nothing is lost or doubled.

`CASES` has one row for each point of `agent.faults.POINTS`. Each row: a load of
thirty jobs of all sources is given to real processes, the process that owns
the point ends there, it is started again without the fault, and then the
ledger, the folders and the console are compared with docs/protocol.md, "Jobs":
one end and one result a job, `rev` from 1 without a gap, numbers on the wire
without a gap, nothing under way, nothing waiting.

One box serves all rows, as one box would live through all these crashes.
"""

import contextlib
import json
import signal
import sqlite3
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from ulid import ULID

from agent.commands import new_id
from agent.faults import POINTS, VARIABLE
from tests.harness.box import DEVICE, MODEL, Box, RecordingConsole, make_body, make_envelope
from tests.harness.brokers import MqttProcess, QueueProcess
from tests.harness.folders import DAMAGED, list_names, put_arrays, put_file, read_lines
from tests.harness.waiting import require_binary, wait_until

MQTT_JOBS, FILES, DAMAGED_FILES, COMMANDS = 15, 8, 3, 4
ENDS = {"succeeded", "failed", "timed_out", "canceled", "expired", "rejected"}
LAST_NUMBER = "SELECT coalesce(max(value), 0) FROM counters WHERE name = 'seq'"
WAIT_S = 20.0
# To look at everything takes its time too.
_LOOK_S = 0.1
DAY_MS = 86_400_000


@dataclass(frozen=True)
class Case:
    """How a point is reached.

    Attributes:
        count: the passing at which the process ends.
        console_acks: the console's acknowledgements count, and it gives some.
        settings: of the process that is to end.
        before: what the box does, without a fault, before.
    """

    count: int = 1
    console_acks: bool = False
    settings: dict[str, str] = field(default_factory=dict)
    before: "Callable[[Stage, Load], None] | None" = None


@dataclass
class Load:
    """What was given to the box, by source."""

    label: str
    since: int
    """The highest job number in the ledger before."""
    mqtt: list[str] = field(default_factory=list)
    local: list[str] = field(default_factory=list)
    good: set[str] = field(default_factory=set)
    damaged: set[str] = field(default_factory=set)
    old: list[str] = field(default_factory=list)
    """Jobs that are forgotten in the course of it."""


class Stage:
    """The box, its brokers and its console."""

    def __init__(self, folder: Path, mqtt: MqttProcess, queue: QueueProcess) -> None:
        self.box = Box(
            folder,
            mqtt,
            queue,
            EDGEWARD_INBOX__SETTLE_S="0.05",
            EDGEWARD_INBOX__SCAN_S="0.05",
            EDGEWARD_QUEUE__LOST_AFTER_S="1.5",
            EDGEWARD_MQTT__RECONNECT_MIN_S="0.1",
        )
        self.console = RecordingConsole(mqtt.port)
        self.inbox = self.box.data_dir / "inbox"
        self.box.start("worker")
        self.start_agent()
        wait_until(lambda: self.console.find("status"), 30, "the agent is online")
        wait_until(self.inbox.is_dir, 10, "the inbox is there")
        # From here the broker keeps what is meant for an agent that is down.
        self.box.kill("agent")

    def start_agent(self, **environment: str) -> None:
        """Start the agent; unless told otherwise the broker's acknowledgements count."""
        self.box.start("agent", **{"EDGEWARD_OUTBOX__ACK": "broker", **environment})

    # --- the load ----------------------------------------------------------------------------

    def begin(self, label: str) -> Load:
        """Take note of what the ledger holds before a load."""
        [(since,)] = self.box.query("SELECT coalesce(max(seq), 0) FROM jobs")
        return Load(label, int(since))

    def put(self, load: Load) -> None:
        """Give the box thirty jobs: by MQTT, by folder, by command line."""
        load.mqtt += self.console.submit_many(MQTT_JOBS)
        load.good = {f"{load.label}-{index}.npy" for index in range(FILES)}
        load.damaged = {f"{load.label}-damaged-{index}.npy" for index in range(DAMAGED_FILES)}
        put_arrays(self.inbox / MODEL, sorted(load.good))
        for name in sorted(load.damaged):
            put_file(self.inbox / MODEL, name, DAMAGED)
        for _ in range(COMMANDS):
            job_id = new_id()
            load.local.append(job_id)
            command = make_envelope(make_body(job_id=job_id))
            put_file(self.inbox / "_commands", f"{job_id}.json", command)

    def acknowledge(self) -> None:
        """Say what the console has, and let the device send the rest again."""
        body = {"seq": self.find_contiguous(), "ledger": self.find_identity()}
        head = f"edgeward/v1/{DEVICE}/c2d/"
        self.console.publish(head + "ack", make_envelope(body, "ack"))
        body["acked_seq"] = body.pop("seq")
        self.console.publish(head + "sync", make_envelope(body, "sync"))

    def find_identity(self) -> str:
        """Return the ledger's identity as the newest status says it."""
        return str(self.console.find("status")[-1]["ledger"])

    def find_numbers(self) -> set[int]:
        """Return the record numbers that the console has or was told to be gone."""
        numbers: set[int] = set()
        for _, document in list(self.console.messages):
            if document.get("seq") is not None:
                numbers.add(document["seq"])
            if document.get("type") == "event.gap":
                body = document["body"]
                numbers |= set(range(body["from_seq"], body["to_seq"] + 1))
        return numbers

    def find_contiguous(self) -> int:
        """Return the highest number below which the console misses none."""
        numbers = self.find_numbers()
        return next(number for number in range(len(numbers) + 1) if number + 1 not in numbers)

    # --- the crash ---------------------------------------------------------------------------

    def wait_killed(self, name: str, case: Case, load: Load) -> None:
        """Wait until a process has ended itself; give it more where once is not enough."""
        process = self.box.processes[name]
        next_nudge = 0.0

        def has_ended() -> bool:
            nonlocal next_nudge
            if process.poll() is not None:
                return True
            if time.monotonic() >= next_nudge and len(load.mqtt) < MQTT_JOBS * 2:
                next_nudge = time.monotonic() + 0.2
                if case.console_acks:
                    self.acknowledge()
                if case.count > 1:
                    load.mqtt.append(self.console.submit())
            return False

        log = self.box.read_log
        wait_until(has_ended, WAIT_S, f"{name} passes the point; log:\n{log()[-2000:]}")
        assert process.returncode == -signal.SIGKILL, log()[-2000:]
        del self.box.processes[name]

    # --- afterwards ----------------------------------------------------------------------------

    def wait_done(self, load: Load, case: Case) -> None:
        """Wait until everything has ended, is delivered and known to the console."""
        next_look = 0.0

        def is_done() -> bool:
            nonlocal next_look
            if time.monotonic() < next_look:
                return False
            if case.settings.get("EDGEWARD_OUTBOX__ACK") == "console":
                self.acknowledge()
            next_look = time.monotonic() + _LOOK_S
            return not self.find_missing(load)

        try:
            wait_until(is_done, WAIT_S, "all is done")
        except AssertionError as exc:
            missing = self.find_missing(load)
            message = f"{exc}: {missing}\n{self.box.read_log()[-3000:]}"
            raise AssertionError(message) from exc

    def find_missing(self, load: Load) -> str:
        """Return what is not done yet, or an empty text."""
        with contextlib.suppress(sqlite3.Error):
            rows = self.find_jobs(load)
            [(waiting,)] = self.box.query("SELECT count(*) FROM outbox")
            [(last,)] = self.box.query(
                "SELECT coalesce(max(value), 0) FROM counters WHERE name = 'seq'"
            )
            open_jobs = [job_id for job_id, (state, _) in rows.items() if state not in ENDS]
            awaited = set(load.mqtt + load.local) - rows.keys()
            parts = {
                "open": open_jobs,
                "not taken": sorted(awaited),
                "in .work": sorted(list_names(self.inbox / MODEL / ".work")),
                "not delivered": sorted(load.good - list_names(self.inbox / MODEL / "done")),
                "not explained": sorted(load.damaged - list_names(self.inbox / MODEL / "failed")),
                "commands": sorted(list_names(self.inbox / "_commands")),
                "not reported": self.find_unreported(load, rows),
                "outbox": waiting,
                "numbers": last - self.find_contiguous(),
                "not forgotten": self.find_remembered(load),
            }
            return ", ".join(f"{name}: {value}" for name, value in parts.items() if value)
        return "the ledger cannot be read"

    def find_jobs(self, load: Load) -> dict[str, tuple[str, int]]:
        """Return state and rev of the jobs in the ledger that came with a load."""
        rows = self.box.query(f"SELECT job_id, state, rev FROM jobs WHERE seq > {load.since}")
        return {row[0]: (row[1], row[2]) for row in rows if row[0] not in load.old}

    def find_unreported(self, load: Load, rows: dict[str, tuple[str, int]]) -> list[str]:
        """Return jobs whose end, or whose result, the console does not know."""
        results = [job_id for job_id, (state, _) in rows.items() if state == "succeeded"]
        return [
            *(job_id for job_id in rows if (self.last_state(job_id)) != rows[job_id]),
            *(job_id for job_id in [*results, *load.old] if job_id not in self.console.results),
        ]

    def last_state(self, job_id: str) -> tuple[str, int] | None:
        """Return the last state that the console knows of a job, and its rev."""
        state = self.console.last_state(job_id)
        return None if state is None else (state["state"], state["rev"])

    def find_remembered(self, load: Load) -> list[str]:
        """Return jobs that should be forgotten."""
        names = ",".join(f"'{job_id}'" for job_id in load.old)
        return [
            row[0] for row in self.box.query(f"SELECT job_id FROM jobs WHERE job_id IN ({names})")
        ]

    def check(self, load: Load) -> None:
        """Compare ledger, folders and console with the promises."""
        rows = self.find_jobs(load)
        lines = Counter(
            line["file"]
            for line in read_lines(self.box.data_dir / "outbox" / MODEL)
            if line["file"] in load.good | load.damaged
        )
        assert lines == Counter(load.good)
        failed = {
            document["job_id"]: document["file"]
            for document in self.read_reasons()
            if document["file"] in load.damaged
        }
        assert sorted(failed.values()) == sorted(load.damaged)
        folder = len(load.good) + len(load.damaged)
        assert len(rows) == len(load.mqtt) + len(load.local) + folder
        history: dict[str, list[tuple[int, str]]] = {}
        for job_id, rev, state in self.box.query("SELECT job_id, rev, state FROM transitions"):
            history.setdefault(job_id, []).append((rev, state))
        for job_id, (state, rev) in rows.items():
            steps = sorted(history[job_id])
            assert state == ("failed" if job_id in failed else "succeeded")
            assert [number for number, _ in steps] == list(range(1, rev + 1))
            assert [name for _, name in steps if name in ENDS] == [state]
        for job_id, documents in self.console.results.items():
            assert len({json.dumps(body, sort_keys=True) for body in documents}) == 1, job_id

    def read_reasons(self) -> list[dict[str, str]]:
        """Return the reason files' contents."""
        failed = self.inbox / MODEL / "failed"
        return [json.loads(path.read_text()) for path in failed.glob("*.reason.json")]

    def close(self) -> None:
        """End everything."""
        for name in list(self.box.processes):
            self.box.kill(name)
        self.console.close()


# --- what has to be before ----------------------------------------------------------------------


def leave_open_jobs(stage: Stage, load: Load) -> None:
    """Let the agent take jobs that no worker runs, and end it."""
    worker = stage.box.processes["worker"]
    worker.send_signal(signal.SIGSTOP)
    try:
        stage.start_agent()
        stage.put(load)
        try:
            wait_until(
                lambda: set(load.mqtt + load.local) <= stage.find_jobs(load).keys(), WAIT_S, "taken"
            )
        except AssertionError as exc:
            message = f"{exc}: {stage.find_missing(load)}\n{stage.box.read_log()[-3000:]}"
            raise AssertionError(message) from exc
        stage.box.kill("agent")
    finally:
        worker.send_signal(signal.SIGCONT)


def leave_events(stage: Stage, _load: Load) -> None:
    """Let more events wait for a console than may: each bad command is one."""
    stage.start_agent(EDGEWARD_OUTBOX__ACK="console")
    for _ in range(20):
        stage.console.publish(f"edgeward/v1/{DEVICE}/c2d/cmd/nonsense", b"{")
    query = "SELECT count(*) FROM outbox WHERE type LIKE 'event.%'"
    wait_until(lambda: stage.box.query(query)[0][0] > 10, WAIT_S, "events wait")
    stage.box.kill("agent")


def leave_old_jobs(stage: Stage, load: Load) -> None:
    """Let jobs of the day before yesterday end, and the newest known id be of today."""
    now_ms = time.time_ns() // 1_000_000
    load.old = [str(ULID.from_timestamp((now_ms - 2 * DAY_MS) / 1000)) for _ in range(5)]
    stage.start_agent()
    for job_id in load.old:
        stage.console.submit(job_id=job_id)
    wait_until(
        lambda: all(job_id in stage.console.results for job_id in load.old), WAIT_S, "they ended"
    )
    stage.box.kill("agent")
    # As the last housekeeping would have left it, half a minute later.
    with contextlib.closing(sqlite3.connect(stage.box.data_dir / "ledger.db")) as connection:
        connection.execute(
            "INSERT OR REPLACE INTO counters (name, value) VALUES ('newest_id_ms', ?)", (now_ms,)
        )
        connection.commit()


CONSOLE = {"EDGEWARD_OUTBOX__ACK": "console"}
CASES = {point: Case() for point in POINTS} | {
    "outbox.forgotten": Case(console_acks=True, settings=CONSOLE),
    "sync.answered": Case(console_acks=True, settings=CONSOLE),
    "outbox.bounded": Case(
        settings=CONSOLE | {"EDGEWARD_OUTBOX__EVENTS": "10"}, before=leave_events
    ),
    "retention.forgotten": Case(
        settings={"EDGEWARD_STORE__KEEP_ENDS_DAYS": "1"}, before=leave_old_jobs
    ),
    "recovery.migrated": Case(before=leave_open_jobs),
    "recovery.counted": Case(before=leave_open_jobs),
    "recovery.started": Case(before=leave_open_jobs),
}
LATER = ["dispatch.sent", "outbox.published", "worker.ran", "inbox.delivered"]


# --- the tests ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def brokers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[MqttProcess, QueueProcess]]:
    require_binary("mosquitto")
    folder = tmp_path_factory.mktemp("brokers")
    mqtt, queue = MqttProcess(folder / "mosquitto"), QueueProcess(folder / "queue")
    mqtt.start()
    queue.start()
    yield mqtt, queue
    mqtt.stop()
    queue.stop()


@pytest.fixture(scope="module")
def stage(
    tmp_path_factory: pytest.TempPathFactory, brokers: tuple[MqttProcess, QueueProcess]
) -> Iterator[Stage]:
    stage = Stage(tmp_path_factory.mktemp("box"), *brokers)
    yield stage
    stage.close()


def run_case(stage: Stage, point: str, case: Case) -> None:
    """End the process that owns a point there, start it again, and check everything."""
    load = stage.begin(f"{point}-{case.count}")
    armed = {VARIABLE: f"{point}:{case.count}", **case.settings}
    if case.before is not None:
        case.before(stage, load)
    if point.startswith("worker."):
        stage.box.kill("worker")
        stage.start_agent()
        stage.box.start("worker", **armed)
        owner = "worker"
    else:
        stage.start_agent(**armed)
        owner = "agent"
    if not load.mqtt:
        stage.put(load)
    stage.wait_killed(owner, case, load)
    if owner == "worker":
        stage.box.start("worker")
    else:
        stage.start_agent(**case.settings)
    stage.wait_done(load, case)
    stage.check(load)


@pytest.fixture(autouse=True)
def end_agent(stage: Stage) -> Iterator[None]:
    """Leave no agent behind, and a worker that lives."""
    yield
    if "agent" in stage.box.processes:
        stage.box.kill("agent")
    stage.box.supervise()
    if "worker" not in stage.box.processes:
        stage.box.start("worker")


@pytest.mark.parametrize("point", CASES)
def test_process_that_ends_at_a_point_loses_and_doubles_nothing(stage: Stage, point: str) -> None:
    run_case(stage, point, CASES[point])


@pytest.mark.parametrize("point", LATER)
def test_process_that_ends_at_the_third_passing_loses_and_doubles_nothing(
    stage: Stage, point: str
) -> None:
    run_case(stage, point, Case(count=3))


def test_every_point_has_its_case() -> None:
    assert set(CASES) == set(POINTS)
