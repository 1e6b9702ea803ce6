"""What a bug report needs to know of a box, and what it must not.

Owns the list of what is collected. Each part is made on its own, so that a box whose agent
is down, whose ledger is damaged or whose settings cannot be read still gives the others.
Writes nothing but the bundle; reads the ledger read-only. Job bodies, results and files
stay on the box unless a job is named.
"""

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import psutil
from sqlalchemy import Connection
from sqlalchemy.exc import SQLAlchemyError

from agent.config import ENV_PREFIX, Settings
from agent.errors import AgentError
from console.bundle import Bundle
from console.secrecy import MASK, Scrubber, find_url_secrets, is_secret_name

Json = dict[str, Any]

LEFT_OUT = {
    "passwords, tokens and private keys": "they are secrets; where one stood it says ********",
    "bodies, inputs and results of jobs": "they are your data; --with-job ID adds one job's",
    "files of inbox, outbox and results": "they are your data; only their number and size is here",
    "weights of models": "they are large, and perhaps yours alone; their digests are here",
    "environment variables of others": "only EDGEWARD_* says something about Edgeward",
}
_LOG_LINES = 2000
_LOG_BYTES = 1 << 20
_COMMAND_S = 10.0
_MQTT_S = 3.0
_VERSION_PROGRAMS = (
    ("mosquitto", "-h"),
    ("valkey-server", "--version"),
    ("redis-server", "--version"),
    ("systemctl", "--version"),
)
_LEDGER_QUERIES = {
    "schema": "SELECT version_num FROM alembic_version",
    "jobs_by_state": "SELECT state, count(*) AS jobs FROM jobs GROUP BY state",
    "open_jobs_by_model": "SELECT model, lane, state, count(*) AS jobs, max(attempt) AS attempts "
    "FROM jobs WHERE ended_ms IS NULL GROUP BY model, lane, state",
    "oldest_open_job": "SELECT job_id, state, model, lane, attempt, reason_code, created_ms, "
    "started_ms FROM jobs WHERE ended_ms IS NULL ORDER BY seq LIMIT 1",
    "ends_by_reason": "SELECT state, reason_code, count(*) AS jobs FROM jobs "
    "WHERE ended_ms IS NOT NULL GROUP BY state, reason_code",
    "outbox_by_class": "SELECT rank, kind, count(*) AS records, sum(seq IS NOT NULL) AS numbered, "
    "sum(length(body)) AS bytes, min(created_ms) AS oldest_ms FROM outbox GROUP BY rank, kind",
    "counters": "SELECT name, value FROM counters",
    "facts": "SELECT name, value FROM facts",
    "quarantine": "SELECT model, version, reason, since_ms FROM quarantine",
    "crashes": "SELECT model, version, signal, at_ms FROM crashes ORDER BY at_ms DESC LIMIT 50",
    "quick_check": "PRAGMA quick_check(20)",
}
_JOB_QUERIES = {
    "job": "SELECT * FROM jobs WHERE job_id = ?",
    "transitions": "SELECT * FROM transitions WHERE job_id = ? ORDER BY rev",
    "outbox": "SELECT * FROM outbox WHERE job_id = ? ORDER BY id",
}


def find_secrets(settings: Settings | None, environ: Mapping[str, str]) -> list[str]:
    """Return the texts that are secret on this box, from its settings and its environment."""
    secrets = []
    for name, value in environ.items():
        if name.startswith(ENV_PREFIX):
            secrets += [value] if is_secret_name(name) else find_url_secrets(value)
    if settings is None:
        return secrets
    if settings.mqtt.password is not None:
        secrets.append(settings.mqtt.password.get_secret_value())
    # A password file that cannot be read holds nothing that could get out.
    with suppress(AgentError):
        secrets.append(settings.password() or "")
    return secrets + find_url_secrets(settings.queue.url or "")


def collect_box(
    settings: Settings, bundle: Bundle, config: Path | None, flags: Mapping[str, Any]
) -> None:
    """Add everything that needs the settings.

    Args:
        settings: of this box.
        bundle: where it goes.
        config: the settings file that was named on the command line.
        flags: settings that came from the command line.
    """
    bundle.collect(
        "settings.json",
        "every setting, where it came from",
        partial(_list_settings, settings, config, flags),
    )
    bundle.collect("doctor.json", "the doctor's report", partial(_examine, settings))
    bundle.collect("status.json", "what the agent last said", partial(_read_status, settings))
    bundle.collect("ledger.json", "the ledger's facts", partial(read_ledger, settings))
    bundle.collect("models.json", "models and manifests", partial(_list_models, settings))
    bundle.collect("queue.json", "the queue broker's version", partial(_ask_queue, settings))
    bundle.collect("mqtt.json", "the MQTT broker's version", partial(_ask_mqtt, settings))
    bundle.collect("folders.json", "what the folders hold", partial(_measure, settings))
    for path in _find_logs(settings):
        name = f"logs/{path.name}"
        bundle.collect(name, "the end of a log", partial(_read_end, path))


def collect_machine(bundle: Bundle) -> None:
    """Add everything that needs no settings."""
    bundle.collect("versions.json", "versions of all parts", _list_versions)
    bundle.collect("environment.json", "EDGEWARD_* of the environment", list_environment)
    bundle.collect("machine.json", "memory, load, processes", _describe_machine)
    if shutil.which("journalctl"):
        bundle.collect("logs/journal.txt", "the end of the units' journal", _read_journal)


def collect_job(settings: Settings, bundle: Bundle, job_id: str) -> None:
    """Add one job whole, its input and result with it."""
    make = partial(_read_ledger, settings, _JOB_QUERIES, (job_id,))
    bundle.collect(f"job-{job_id}.json", "one job, whole, as it was asked for", make)


def make_scrubber(settings: Settings | None) -> Scrubber:
    """Return what takes this box's secrets out of texts."""
    return Scrubber(find_secrets(settings, os.environ))


# --- the parts ----------------------------------------------------------------------------


def _list_versions() -> Json:
    packages = {item.name: item.version for item in importlib.metadata.distributions()}
    return {
        "edgeward": importlib.metadata.version("edgeward"),
        "python": sys.version,
        "executable": sys.executable,
        "system": {"kernel": os.uname().release, "machine": os.uname().machine},
        "os_release": _read_end(Path("/etc/os-release")),
        "programs": {name: _run(name, flag)[:200] for name, flag in _VERSION_PROGRAMS},
        "packages": dict(sorted(packages.items())),
    }


def _run(*argv: str) -> str:
    """Return what a program says, or why it says nothing."""
    try:
        done = subprocess.run(
            argv, capture_output=True, text=True, errors="replace", timeout=_COMMAND_S, check=False
        )
    except (OSError, subprocess.SubprocessError) as exc:
        return f"({exc})"
    return done.stdout or done.stderr


def list_environment() -> Json:
    """Return Edgeward's own environment variables; secrets are masked by name."""
    own = {name: text for name, text in os.environ.items() if name.startswith(ENV_PREFIX)}
    return {name: MASK if is_secret_name(name) else _parse(text) for name, text in own.items()}


def _parse(text: str) -> Any:
    """Return a section given as JSON as what it is, so that its secrets are found by name."""
    if not text.startswith(("{", "[")):
        return text
    try:
        return json.loads(text)
    except ValueError:
        return "(no JSON; left out)"


def _describe_machine() -> Json:
    memory, swap = psutil.virtual_memory(), psutil.swap_memory()
    ours = [
        {
            **process.as_dict(["pid", "ppid", "create_time", "num_fds", "num_threads", "status"]),
            "rss_bytes": process.memory_info().rss,
            "command": process.cmdline()[:6],
        }
        for process in psutil.process_iter()
        if _is_ours(process)
    ]
    return {
        "memory": memory._asdict(),
        "swap": swap._asdict(),
        "load": os.getloadavg(),
        "cpus": os.cpu_count(),
        "booted_s_ago": round(time.time() - psutil.boot_time()),
        "disks": [item._asdict() for item in psutil.disk_partitions()],
        "processes": ours,
    }


def _is_ours(process: psutil.Process) -> bool:
    try:
        return any("edgeward" in part for part in process.cmdline()[:3])
    except psutil.Error:
        return False


def _read_journal() -> str:
    return _run(
        "journalctl", "-u", "edgeward*", "-n", str(_LOG_LINES), "--no-pager", "-o", "short-iso"
    )


def _list_settings(settings: Settings, config: Path | None, flags: Mapping[str, Any]) -> list[Json]:
    from console.settings_view import list_settings

    return [
        {"key": line.key, "value": line.value, "origin": line.origin}
        for line in list_settings(settings, config, flags)
    ]


def _examine(settings: Settings) -> Json:
    from console.doctor import choose_targets, collect

    return collect(choose_targets(settings)).to_json()


def _read_status(settings: Settings) -> Json:
    from console.boxstate import read_status

    status = read_status(settings)
    return {"is_running": status.is_running, "at_ms": status.at_ms, "values": status.values}


def read_ledger(settings: Settings) -> Json:
    """Return counts and facts of the ledger, each on its own; no job's body, no result."""
    files = {
        path.name: path.stat().st_size
        for path in settings.data_dir.glob(f"{settings.ledger_file.name}*")
    }
    return {"files_bytes": files, **_read_ledger(settings, _LEDGER_QUERIES, ())}


def _read_ledger(settings: Settings, queries: Mapping[str, str], params: tuple[Any, ...]) -> Json:
    found: Json = {}
    for name, query in queries.items():
        # A connection for each: a damaged page may make one unusable.
        try:
            with _connect(settings) as connection:
                rows = connection.exec_driver_sql(query, params).mappings()
                found[name] = [dict(row) for row in rows]
        except (SQLAlchemyError, AgentError) as exc:
            found[name] = {"error": str(exc).partition("\n")[0]}
    return found


@contextmanager
def _connect(settings: Settings) -> Iterator[Connection]:
    from agent.store.database import open_reader

    engine = open_reader(settings.ledger_file)
    try:
        with engine.connect() as connection:
            yield connection
    finally:
        engine.dispose()


def _list_models(settings: Settings) -> list[Json]:
    from agent.repository import ModelRepository

    repository = ModelRepository(settings.models_dir)
    return [
        {
            "model": version.name,
            "version": version.number,
            "release": version.release,
            "active": version.is_active,
            "previous": version.is_previous,
            "files": {path.name: path.stat().st_size for path in sorted(version.folder.iterdir())},
            "manifest": _read_end(version.folder / "manifest.json"),
        }
        for name in repository.list_models()
        for version in repository.list_versions(name)
    ]


def _ask_queue(settings: Settings) -> Json:
    from agent.tasks import connect_redis

    with closing(connect_redis(settings.queue_url)) as client:
        info: Any = client.info()
    wanted = (
        "redis_version",
        "valkey_version",
        "server_name",
        "uptime_in_seconds",
        "used_memory",
        "maxmemory",
        "maxmemory_policy",
        "connected_clients",
        "total_commands_processed",
    )
    return {name: info[name] for name in wanted if name in info}


def _ask_mqtt(settings: Settings) -> Json:
    from agent.commands import new_id
    from console.connection import Arrived, Connection

    if not settings.mqtt.enabled:
        return {"mqtt": "disabled"}
    connection = Connection(
        settings.mqtt,
        f"edgeward-diag-{new_id()}",
        ["$SYS/broker/version", "$SYS/broker/uptime", "$SYS/broker/clients/connected"],
        is_durable=False,
        reconnect_s=1.0,
        password=settings.password(),
    )
    connection.open()
    try:
        heard = connection.take(_MQTT_S, 1) + connection.take(0.5, 10) + connection.take(0.5, 10)
    finally:
        connection.close()
    said = [item for item in heard if isinstance(item, Arrived)]
    return {item.topic: item.payload.decode(errors="replace") for item in said}


def _measure(settings: Settings) -> Json:
    roots = {
        "data": settings.data_dir,
        "run": settings.runtime_dir,
        "models": settings.models_dir,
        "inbox": settings.inbox_dir,
        "outbox": settings.outbox_dir,
        "results": settings.results_dir,
    }
    return {name: _measure_folder(path) for name, path in roots.items()}


def _measure_folder(path: Path) -> Json:
    if not path.is_dir():
        return {"path": str(path), "exists": False}
    usage = shutil.disk_usage(path)
    files = size = 0
    deadline = time.monotonic() + _COMMAND_S
    for found in path.rglob("*"):
        if found.is_file() and not found.is_symlink():
            files, size = files + 1, size + found.stat().st_size
        if time.monotonic() > deadline:
            break
    space = {"disk_total": usage.total, "disk_free": usage.free}
    return {"path": str(path), "exists": True, "files": files, "bytes": size, **space}


def _find_logs(settings: Settings) -> list[Path]:
    folder = settings.data_dir / "log"
    return sorted(folder.glob("*.log")) if folder.is_dir() else []


def _read_end(path: Path) -> str:
    """Return the last lines of a text file."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - _LOG_BYTES))
        text = file.read(_LOG_BYTES).decode(errors="replace")
    return "\n".join(deque(text.splitlines(), maxlen=_LOG_LINES))
