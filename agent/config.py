"""Settings: one TOML file, environment variables over it, command-line flags over both.

Owns every setting with its default and meaning (docs/operate.md is made from
these descriptions, and a test keeps it true). An unknown key is an error that
names the nearest known one: a misspelt setting must not be silently ignored on
a box that nobody can walk to.

Environment: `EDGEWARD_` and the key, sections joined by two underscores, such
as `EDGEWARD_MQTT__HOST`. `EDGEWARD_CONFIG` names the file itself.
"""

import difflib
import os
import re
import socket
import threading
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import (
    BaseModel,
    Field,
    ValidationError,
    field_validator,
)
from pydantic_settings import (
    BaseSettings,
    InitSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
)

from agent.errors import ConfigError
from agent.sections import (
    HttpSettings,
    InboxSettings,
    LimitSettings,
    MetricsSettings,
    MqttSettings,
    OutboxSettings,
    QueueSettings,
    StoreSettings,
    UpdateSettings,
    WorkerSettings,
)
from agent.topics import BROADCAST, DEVICE_PATTERN

ENV_PREFIX = "EDGEWARD_"
ENV_DELIMITER = "__"
CONFIG_ENV = "EDGEWARD_CONFIG"
DEFAULT_CONFIG = Path("/etc/edgeward/edgeward.toml")
# Variables with our prefix that are no settings.
_ENV_NOT_SETTINGS = {CONFIG_ENV, "EDGEWARD_FAULT"}
_BUILDING = threading.Lock()


class Settings(BaseSettings):
    """All settings of one box."""

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX,
        env_nested_delimiter=ENV_DELIMITER,
        extra="forbid",
        frozen=True,
        validate_default=True,
    )

    device_id: str = Field(
        default_factory=lambda: re.sub(r"[^A-Za-z0-9_.-]", "-", socket.gethostname())[:64],
        pattern=f"^{DEVICE_PATTERN.pattern}$",
        description="This box's name on MQTT; by default its host name.",
    )
    data_dir: Path = Field(
        default=Path("/var/lib/edgeward"), description="Ledger, models, inbox, results."
    )
    run_dir: Path | None = Field(
        default=None, description="Sockets and status; by default `data_dir`/run."
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", description="Least severe log line written."
    )
    log_json: bool = Field(default=False, description="Write log lines as JSON objects.")
    heartbeat_s: float = Field(default=30.0, gt=0, description="Time between heartbeats.")
    mqtt: MqttSettings = MqttSettings()
    queue: QueueSettings = QueueSettings()
    store: StoreSettings = StoreSettings()
    inbox: InboxSettings = InboxSettings()
    outbox: OutboxSettings = OutboxSettings()
    limits: LimitSettings = LimitSettings()
    worker: WorkerSettings = WorkerSettings()
    updates: UpdateSettings = UpdateSettings()
    metrics: MetricsSettings = MetricsSettings()
    http: HttpSettings = HttpSettings()

    _file: ClassVar[dict[str, Any]] = {}

    @field_validator("device_id")
    @classmethod
    def _check_device(cls, device_id: str) -> str:
        if device_id == BROADCAST:
            msg = f"{BROADCAST!r} is the broadcast's place in topics, not a device"
            raise ValueError(msg)
        return device_id

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Put flags over the environment over the file."""
        del dotenv_settings, file_secret_settings
        return init_settings, env_settings, InitSettingsSource(settings_cls, cls._file)

    @property
    def runtime_dir(self) -> Path:
        """Folder of sockets and of the status file."""
        return self.run_dir or self.data_dir / "run"

    @property
    def ledger_file(self) -> Path:
        """The SQLite file."""
        return self.data_dir / "ledger.db"

    @property
    def models_dir(self) -> Path:
        """Root of the model repository."""
        return self.data_dir / "models"

    @property
    def inbox_dir(self) -> Path:
        """Root of the batch folders."""
        return self.inbox.path or self.data_dir / "inbox"

    @property
    def outbox_dir(self) -> Path:
        """Root of the folders that batch results go to."""
        return self.inbox.outbox or self.data_dir / "outbox"

    @property
    def costs_dir(self) -> Path:
        """What batches of each model cost here, as measured."""
        return self.data_dir / "cache" / "costs"

    @property
    def trust_dir(self) -> Path:
        """Whom this box trusts for releases, and what was verified last."""
        return self.data_dir / "trust"

    @property
    def trust_root_file(self) -> Path:
        """The root metadata that every signature is traced back to."""
        return self.updates.root_file or self.trust_dir / "root.json"

    @property
    def choices_dir(self) -> Path:
        """Which artifact of each version is best here, as measured at staging."""
        return self.data_dir / "choices"

    @property
    def leases_dir(self) -> Path:
        """Who asks that nothing disturbs just now."""
        return self.data_dir / "leases"

    @property
    def results_dir(self) -> Path:
        """Folder of results too large to travel inline."""
        return self.data_dir / "results"

    @property
    def queue_url(self) -> str:
        """URL of the queue broker as Celery and kombu take it."""
        return self.queue.url or f"redis+socket://{self.runtime_dir.absolute()}/queue.sock"

    @property
    def input_roots(self) -> tuple[Path, ...]:
        """Folders that jobs may read input files from."""
        return (self.inbox_dir, *self.limits.roots)

    def password(self) -> str | None:
        """Return the MQTT password from its setting or its file.

        Raises:
            ConfigError: the file cannot be read.
        """
        if self.mqtt.password_file is not None:
            try:
                return self.mqtt.password_file.read_text(encoding="utf-8").strip()
            except OSError as exc:
                msg = f"mqtt.password_file {self.mqtt.password_file}: {exc.strerror}"
                raise ConfigError(msg) from exc
        return self.mqtt.password.get_secret_value() if self.mqtt.password else None


def iter_keys(model: type[BaseModel] = Settings, prefix: str = "") -> Iterator[str]:
    """Yield every setting's dotted key, sections included."""
    for name, field in model.model_fields.items():
        yield prefix + name
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from iter_keys(field.annotation, f"{prefix}{name}.")


def _check_key(key: str, origin: str) -> None:
    known = list(iter_keys())
    if key in known:
        return
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    leaf = difflib.get_close_matches(
        key.rpartition(".")[2], [item.rpartition(".")[2] for item in known], n=1
    )
    near = near or [item for item in known if leaf and item.rpartition(".")[2] == leaf[0]]
    hint = f"; did you mean {near[0]!r}?" if near else "; see docs/operate.md for all settings"
    msg = f"unknown setting {key!r} in {origin}{hint}"
    raise ConfigError(msg)


def _iter_document_keys(document: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for name, value in document.items():
        yield prefix + name
        if isinstance(value, Mapping):
            yield from _iter_document_keys(value, f"{prefix}{name}.")


def read_config(path: Path) -> dict[str, Any]:
    """Read a settings file and check its keys.

    Raises:
        ConfigError: it cannot be read, is no TOML, or has an unknown key.
    """
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as exc:
        msg = f"settings file {path} cannot be read: {exc.strerror}"
        raise ConfigError(msg) from exc
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as exc:
        msg = f"settings file {path} is not TOML: {exc}"
        raise ConfigError(msg) from exc
    for key in _iter_document_keys(document):
        _check_key(key, str(path))
    return document


def _check_environment(environ: Mapping[str, str]) -> None:
    for name in environ:
        if name.startswith(ENV_PREFIX) and name not in _ENV_NOT_SETTINGS:
            key = name.removeprefix(ENV_PREFIX).lower().replace(ENV_DELIMITER, ".")
            _check_key(key, f"the environment ({name})")


def _build(document: dict[str, Any], flags: Mapping[str, Any]) -> Settings:
    # The sources are a class's, not an instance's. A subclass for each file would cost
    # a second copy of the whole schema: 1 MB that the agent keeps.
    with _BUILDING:
        Settings._file = document
        try:
            return Settings(**flags)
        finally:
            Settings._file = {}


def load_settings(config: Path | None = None, flags: Mapping[str, Any] | None = None) -> Settings:
    """Return the settings of this box.

    Args:
        config: the settings file; else `$EDGEWARD_CONFIG`, else
            `/etc/edgeward/edgeward.toml` where that exists.
        flags: values from the command line, nested by section; they win.

    Raises:
        ConfigError: a key is unknown, a value is not usable, a file is not readable.
    """
    named = config or (Path(os.environ[CONFIG_ENV]) if os.environ.get(CONFIG_ENV) else None)
    path = named or (DEFAULT_CONFIG if DEFAULT_CONFIG.exists() else None)
    document = read_config(path) if path else {}
    _check_environment(os.environ)
    try:
        settings = _build(document, flags or {})
    except SettingsError as exc:
        msg = f"an environment variable is no JSON where its setting needs it: {exc}"
        raise ConfigError(msg) from exc
    except ValidationError as exc:
        first = exc.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        msg = f"setting {key or '(all)'}: {first['msg']}"
        raise ConfigError(msg) from exc
    return settings


__all__ = ["Settings", "iter_keys", "load_settings", "read_config"]
