"""Everything of one box under one process: brokers, agent, worker.

Owns what is started, with which settings and in which order, and the lock that keeps a
second `edgeward up` off the same data folder. Keeping the processes alive is
`console.children`'s part. Also what the demo stands on.
"""

import fcntl
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import redis

from agent.config import Settings
from agent.fileio import write_atomic
from agent.jobs import Lane
from agent.tasks import connect_redis, heartbeat_key
from console.boxstate import UP_FILE, read_status_time
from console.children import Children, ChildSpec
from console.embedded import (
    LOOPBACK,
    MqttBroker,
    MqttBrokerKind,
    is_mqtt_answering,
    prepare_mqtt_broker,
    prepare_queue_broker,
)
from console.errors import AlreadyUpError
from console.http_api import name_address, wait_until_live
from console.output import Output, build_facts

AGENT_ENVIRONMENT = {"PYTHONMALLOC": "malloc"}
"""As in the agent's unit: Python's own allocator keeps what it has had for short-lived objects,
which came to 3.6 MB an hour at 20 jobs a second (docs/reliability.md)."""

LANES = (Lane.INFERENCE, Lane.BATCH)
QUEUE, MQTT, AGENT, WORKER = "queue", "mqtt", "agent", "worker"
MAINTENANCE = "maintenance"
_LOCK_FILE = "up.lock"
_LOOPBACK_HOSTS = {LOOPBACK, "localhost", "::1"}
# -P: the working directory is not put on the path, whatever it holds.
_PROGRAM = (sys.executable, "-P", "-m", "console.entry")


@dataclass(frozen=True)
class Plan:
    """What is going to be started, in order, and where it can be found."""

    children: tuple[ChildSpec, ...]
    queue_url: str
    mqtt: str
    """Where the MQTT broker is, in words for a person."""
    http: str = "turned off"
    """Where the HTTP API is."""
    notes: tuple[str, ...] = ()


@dataclass
class _Parts:
    """A plan while it is made."""

    children: list[ChildSpec] = field(default_factory=list)
    env: dict[str, str] = field(default_factory=dict)
    """Settings for agent and worker that nobody wrote down, such as the socket's place."""
    notes: list[str] = field(default_factory=list)


@contextmanager
def hold_box(run_dir: Path) -> Iterator[None]:
    """Hold the data folder's lock, which the kernel lets go when this process ends.

    Raises:
        AlreadyUpError: another process holds it; the message has its id.
    """
    run_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    path = run_dir / _LOCK_FILE
    with path.open("a+", encoding="ascii") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as exc:
            file.seek(0)
            holder = file.read().strip() or "unknown"
            msg = (
                f"`edgeward up` runs on this data folder already, as process {holder}: "
                f"stop that one, or give this one another --data-dir"
            )
            raise AlreadyUpError(msg) from exc
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield


def plan_box(settings: Settings, config: Path | None, kind: MqttBrokerKind | None = None) -> Plan:
    """Decide what to start; writes the brokers' settings into the run folder.

    Raises:
        BrokerMissingError: a broker is needed and none is installed.
    """
    parts = _Parts()
    queue_url = _plan_queue(settings, parts)
    where = _plan_mqtt(settings, kind, parts)
    slot = f"{settings.device_id}/up"
    common = _common_options(settings, config)
    maintenance = ("--slot", f"{settings.device_id}/maintenance")
    lanes = [option for lane in LANES for option in ("--lane", lane.value)]
    if settings.http.port is not None:
        parts.env["EDGEWARD_HTTP__PORT"] = str(settings.http.port)
    parts.children += [
        ChildSpec(
            AGENT,
            (*_PROGRAM, AGENT, *common),
            {**parts.env, **AGENT_ENVIRONMENT},
            _is_agent_ready(settings),
        ),
        ChildSpec(
            WORKER,
            (*_PROGRAM, WORKER, *lanes, "--slot", slot, *common),
            parts.env,
            _is_worker_ready(queue_url, slot),
        ),
    ]
    if settings.updates.enabled:
        # Nobody waits for it: an update may begin a moment later.
        lane = ("--lane", Lane.MAINTENANCE.value)
        argv = (*_PROGRAM, WORKER, *lane, *maintenance, *common)
        parts.children.append(ChildSpec(MAINTENANCE, argv, parts.env, lambda: True))
    return Plan(
        tuple(parts.children),
        queue_url,
        where,
        name_address(settings.http),
        tuple(parts.notes),
    )


def _plan_queue(settings: Settings, parts: _Parts) -> str:
    if settings.queue.url is not None:
        parts.notes.append("queue.url is set: no queue broker is started here")
        return settings.queue.url
    broker = prepare_queue_broker(settings.runtime_dir)
    parts.children.append(broker.as_child())
    parts.env["EDGEWARD_QUEUE__URL"] = broker.url
    if broker.note:
        parts.notes.append(broker.note)
    return broker.url


def _plan_mqtt(settings: Settings, kind: MqttBrokerKind | None, parts: _Parts) -> str:
    wanted = settings.mqtt
    parts.env["EDGEWARD_MQTT__PORT"] = str(wanted.port)
    if not wanted.enabled:
        return "turned off"
    address = f"{wanted.host}:{wanted.port}"
    if wanted.host not in _LOOPBACK_HOSTS or wanted.tls:
        return f"{address}, not started here"
    if is_mqtt_answering(LOOPBACK, wanted.port):
        parts.notes.append(f"an MQTT broker answers on {address} already: it is used")
        return f"{address}, not started here"
    broker: MqttBroker = prepare_mqtt_broker(
        settings.runtime_dir, settings.data_dir, port=wanted.port, kind=kind
    )
    parts.children.append(broker.as_child())
    return f"{broker.host}:{broker.port} ({broker.kind})"


def _common_options(settings: Settings, config: Path | None) -> Sequence[str]:
    options = ["--data-dir", str(settings.data_dir), "--device", settings.device_id]
    return options if config is None else [*options, "--config", str(config.absolute())]


def _is_agent_ready(settings: Settings) -> Callable[[], bool]:
    """Return a check that the agent has written its status since now."""
    before = read_status_time(settings)
    return lambda: read_status_time(settings) != before


def _is_worker_ready(queue_url: str, slot: str) -> Callable[[], bool]:
    """Return a check that the worker has said that it lives."""

    def check() -> bool:
        try:
            with connect_redis(queue_url) as client:
                return bool(client.exists(heartbeat_key(slot)))
        except redis.RedisError:
            return False

    return check


@contextmanager
def announce(settings: Settings, plan: Plan) -> Iterator[None]:
    """Tell the commands of this box, while the block runs, what it runs with."""
    flags = {
        "device_id": settings.device_id,
        "mqtt": {"host": settings.mqtt.host, "port": settings.mqtt.port},
        "queue": {"url": plan.queue_url},
        "http": {"port": settings.http.port},
    }
    path = settings.runtime_dir / UP_FILE
    write_atomic(path, json.dumps({"pid": os.getpid(), "flags": flags}), durable=False)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


def add_children(plan: Plan, log_dir: Path) -> Children:
    """Return the children of a plan, none of them started."""
    children = Children(log_dir)
    for child in plan.children:
        children.add(child)
    return children


def run_up(
    settings: Settings, config: Path | None, out: Output, kind: MqttBrokerKind | None
) -> None:
    """Start everything, say where it is, and keep it running until Ctrl-C or SIGTERM.

    Raises:
        AlreadyUpError: another one runs on this data folder.
        BrokerMissingError: a broker is needed and none is installed.
        ChildStartError: a part did not get ready; the others are stopped again.
    """
    settings.data_dir.mkdir(parents=True, exist_ok=True)
    with hold_box(settings.runtime_dir):
        plan = plan_box(settings, config, kind)
        log_dir = settings.data_dir / "log"
        with add_children(plan, log_dir) as children:
            for child in plan.children:
                began = time.monotonic()
                with out.spinner(f"starting {child.name}"):
                    children.start_child(child.name)
                out.note(f"  ✓ {child.name:<11}{time.monotonic() - began:5.1f} s")
            if not wait_until_live(settings.http):
                out.note(f"  ! the HTTP API does not answer yet; see {log_dir / 'worker.log'}")
            for note in plan.notes:
                out.note(f"  · {note}")
            with announce(settings, plan):
                _say_where(settings, plan, log_dir, out)
                children.run_until_stopped()
            out.note("stopped")


def _say_where(settings: Settings, plan: Plan, log_dir: Path, out: Output) -> None:
    places = {
        "device": settings.device_id,
        "data_dir": str(settings.data_dir),
        "mqtt": plan.mqtt,
        "queue": plan.queue_url,
        "http": plan.http,
        "inbox": str(settings.inbox_dir / "MODEL") if settings.inbox.enabled else "turned off",
        "results": str(settings.outbox_dir),
        "logs": str(log_dir),
    }
    out.show(
        {"up": True, **places, "children": [child.name for child in plan.children]},
        lambda: build_facts(places.items()),
    )
    out.note("Ctrl-C stops everything.")
