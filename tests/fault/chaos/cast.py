"""The processes of one box, and a supervisor that starts again what has ended, as systemd would.

Owns four members: `agent`, `worker`, `queue` (Valkey or Redis) and `mqtt` (Mosquitto), with the
settings that the product ships and an agent that reaches its broker through a proxy.

Invariants: a member is down only as long as a fault wants it to be; a process that was stopped
by SIGSTOP is always let go before the cast is closed.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from console.embedded import MqttBrokerKind, prepare_mqtt_broker, prepare_queue_broker
from console.up import AGENT_ENVIRONMENT
from tests.fault.chaos.journal import Journal
from tests.fault.chaos.models import install_models
from tests.fault.chaos.proxy import Proxy
from tests.fault.chaos.wire import Wire
from tests.fault.shifted import write_shift
from tests.harness.known_box import seed_platform
from tests.harness.waiting import wait_until

DEVICE = "chaos-box"
MEMBERS = ("agent", "worker", "queue", "mqtt")
RESTART_S = 0.1
"""systemd's own default; the shipped units wait 1 s."""
_WATCH_S = 0.02
_STOP_LIMIT_S = 20.0
_START_LIMIT_S = 30.0
_ALIVE_LIMIT_S = 5.0

SETTINGS = {
    "EDGEWARD_MQTT__RECONNECT_MAX_S": "2",
    "EDGEWARD_MQTT__KEEPALIVE_S": "5",
    "EDGEWARD_LIMITS__RESULT_BYTES": "1024",
    "EDGEWARD_INBOX__ENABLED": "false",
}
"""Beside the addresses. The default back-off goes up to 5 min, and a half-open link is found
after 1.8 × the keep-alive: too long to be seen often in one run. Results over 1 KiB stay in
files, so that a part of them does."""


class Member:
    """One process that can be killed, stopped, held down and started again.

    Args:
        name: what it is called in the journal.
        argv: its command.
        environment: its environment.
        log_path: where its output goes.
        restart_s: how long it stays down after it has ended.
    """

    def __init__(
        self,
        name: str,
        argv: Sequence[str],
        environment: dict[str, str],
        log_path: Path,
        restart_s: float,
    ) -> None:
        self.name = name
        self.starts = 0
        self.crashes: list[float] = []
        """When it ended badly by itself, such as after a poison job."""
        self._argv = argv
        self._environment = environment
        self._log_path = log_path
        self._restart_s = restart_s
        self._lock = threading.RLock()
        self._process: subprocess.Popen[bytes] | None = None
        self._is_wanted = False
        self._ended_at: float | None = None

    def start(self) -> None:
        """Start it, and again whenever it ends, until `hold`."""
        with self._lock:
            self._is_wanted = True
            if self._process is None or self._process.poll() is not None:
                self._spawn()

    def supervise(self) -> None:
        """Start it again where it has ended and should run."""
        with self._lock:
            if not self._is_wanted or self._process is None or self._process.poll() is None:
                return
            now = time.monotonic()
            if self._ended_at is None:
                self._ended_at = now
                if self._process.returncode not in (0, -signal.SIGKILL):
                    self.crashes.append(now)
            if now - self._ended_at >= self._restart_s:
                self._spawn()

    def _spawn(self) -> None:
        self.starts += 1
        self._ended_at = None
        with self._log_path.open("ab") as log:
            log.write(f"--- start {self.starts} of {self.name}\n".encode())
            log.flush()
            self._process = subprocess.Popen(
                self._argv,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    @property
    def is_alive(self) -> bool:
        """Whether its process exists."""
        with self._lock:
            return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int:
        """Of its newest process."""
        with self._lock:
            assert self._process is not None, f"{self.name} was never started"
            return self._process.pid

    def send(self, number: signal.Signals) -> None:
        """Send a signal; nothing where no process is there."""
        with self._lock:
            if self._process is not None and self._process.poll() is None:
                self._process.send_signal(number)

    def kill(self) -> None:
        """End it as a power cut would; waits for a process to kill, and for its end."""
        wait_until(lambda: self.is_alive, _ALIVE_LIMIT_S, f"{self.name} runs")
        with self._lock:
            process = self._process
        assert process is not None
        process.kill()
        # Otherwise a second kill at once would hit the same process, and count as another.
        process.wait(_STOP_LIMIT_S)

    def hold(self, number: signal.Signals = signal.SIGTERM) -> None:
        """End it and keep it down until `start`."""
        with self._lock:
            self._is_wanted = False
            process = self._process
        if process is None:
            return
        self.send(number)
        self.send(signal.SIGCONT)
        try:
            process.wait(_STOP_LIMIT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def read_log(self, last_bytes: int = 4000) -> str:
        """Return the end of what it wrote."""
        if not self._log_path.exists():
            return ""
        return self._log_path.read_bytes()[-last_bytes:].decode(errors="replace")


class Cast:
    """The box of one run.

    Args:
        folder: for everything that the run leaves.
        journal: told of each restart.
        seed: of the proxy's duplicates.
        duplicate: probability of a duplicate on the agent's link.
        agent_argv: starts the agent; the product's command by default.
        settings: further settings, as environment variables.
        restart_s: how long a process stays down; the shipped units have 1 s.
        wire: a network of its own for the agent.
        durable: whether Mosquitto writes its store at each change, or every 5 s as shipped.
            It writes the whole store each time, with every retained state in it: at 2,600 of
            them it let about five packets a second pass (mosquitto 2.0.11, 2026-11-22).
    """

    def __init__(
        self,
        folder: Path,
        journal: Journal,
        *,
        seed: int = 0,
        duplicate: float = 0.0,
        agent_argv: Sequence[str] | None = None,
        settings: dict[str, str] | None = None,
        restart_s: float = RESTART_S,
        wire: Wire | None = None,
        durable: bool = False,
    ) -> None:
        self.folder = folder
        self.data_dir = folder / "data"
        seed_platform(self.data_dir)
        self.ledger_path = self.data_dir / "ledger.db"
        mqtt = prepare_mqtt_broker(
            folder / "mqtt", folder, kind=MqttBrokerKind.MOSQUITTO, durable=durable
        )
        queue = prepare_queue_broker(folder / "queue")
        self.mqtt_port = mqtt.port
        self.queue_socket = queue.socket_path
        self._is_mqtt_ready, self._is_queue_ready = mqtt.is_ready, queue.is_ready
        self.proxy = Proxy(mqtt.port, seed, duplicate, wire)
        self.proxy.start()
        steps = install_models(folder / "models", self.data_dir / "models")
        kept = {key: value for key, value in os.environ.items() if not key.startswith("EDGEWARD_")}
        path = os.pathsep.join([str(steps), *filter(None, [kept.get("PYTHONPATH")])])
        environment = {
            **kept,
            "PYTHONPATH": path,
            "EDGEWARD_DATA_DIR": str(self.data_dir),
            "EDGEWARD_DEVICE_ID": DEVICE,
            "EDGEWARD_MQTT__HOST": self.proxy.host,
            "EDGEWARD_MQTT__PORT": str(self.proxy.port),
            "EDGEWARD_MQTT__ALLOW_PLAIN": "true",
            "EDGEWARD_QUEUE__URL": queue.url,
            **SETTINGS,
            **(settings or {}),
        }
        self._clock_path = folder / "clock.json"
        self.set_clock(0)
        program = (sys.executable, "-m", "tests.fault.shifted", str(self._clock_path))
        agent = agent_argv or (*program, "agent")
        commands: dict[str, Sequence[str]] = {
            "agent": agent if wire is None else wire.wrap(agent),
            "worker": (*program, "worker", "--lane", "inference", "--lane", "batch"),
            "queue": queue.argv,
            "mqtt": mqtt.argv,
        }
        self.members = {
            name: Member(
                name,
                commands[name],
                # As a real one is started: measured here, its memory is the product's.
                {**environment, **AGENT_ENVIRONMENT} if name == "agent" else environment,
                folder / f"{name}.log",
                restart_s,
            )
            for name in MEMBERS
        }
        self._journal = journal
        self._closing = threading.Event()
        self._supervisor = threading.Thread(target=self._watch, name="supervisor", daemon=True)

    def start(self) -> None:
        """Start the brokers, then the others, and the supervisor."""
        self.members["mqtt"].start()
        self.members["queue"].start()
        wait_until(self._is_mqtt_ready, _START_LIMIT_S, "the MQTT broker serves")
        wait_until(self._is_queue_ready, _START_LIMIT_S, "the queue broker serves")
        self.members["agent"].start()
        self.members["worker"].start()
        self._supervisor.start()

    def _watch(self) -> None:
        while not self._closing.wait(_WATCH_S):
            for member in self.members.values():
                before = member.starts
                member.supervise()
                if member.starts != before:
                    self._journal.note("restarted", member=member.name)

    def set_clock(self, offset_s: int) -> None:
        """Put the wall clock of agent and worker wrong by so many seconds."""
        write_shift(self._clock_path, offset_s, is_hurried=False)

    def forget_mqtt(self) -> None:
        """Remove what the MQTT broker has stored, while it is down."""
        (self.folder / "mqtt" / "mosquitto.db").unlink(missing_ok=True)

    def stop_agent(self) -> None:
        """End agent and worker as systemd would; the brokers go on."""
        self.members["agent"].hold()
        self.members["worker"].hold()

    def close(self) -> None:
        """Stop everything."""
        self._closing.set()
        if self._supervisor.is_alive():
            self._supervisor.join(_STOP_LIMIT_S)
        for name in MEMBERS:
            self.members[name].hold()
        self.proxy.stop()

    def describe_logs(self) -> str:
        """Return the ends of all logs, for a failed run's message."""
        return "\n".join(f"== {name}\n{self.members[name].read_log()}" for name in MEMBERS)
