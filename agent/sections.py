"""The sections of the settings, each key with its default and its meaning.

Reading them from file, environment and flags is `agent.config`'s matter.
"""

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, SecretStr, model_validator

_LOOPBACK = {"127.0.0.1", "::1", "localhost"}


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class MqttSettings(_Section):
    """Connection to the site's or cloud's MQTT 5 broker."""

    enabled: bool = Field(default=True, description="False: folders and local commands only.")
    host: str = Field(default="127.0.0.1", description="Host name or address of the broker.")
    port: int = Field(default=1883, ge=1, le=65535, description="TCP port of the broker.")
    username: str | None = Field(default=None, description="User name; equal to the device id.")
    password: SecretStr | None = Field(default=None, description="Password; better a file.")
    password_file: Path | None = Field(default=None, description="File holding the password.")
    tls: bool = Field(default=False, description="Use TLS 1.2 or later.")
    ca_file: Path | None = Field(default=None, description="CA certificates (system's if none).")
    cert_file: Path | None = Field(default=None, description="Client certificate, PEM.")
    key_file: Path | None = Field(default=None, description="Client certificate's key, PEM.")
    allow_plain: bool = Field(
        default=False, description="Allow a connection without TLS to another machine."
    )
    keepalive_s: int = Field(default=20, ge=5, le=3600, description="MQTT keep-alive.")
    session_expiry_s: int = Field(
        default=7 * 86400, ge=0, description="How long the broker keeps our session while offline."
    )
    will_delay_s: int = Field(
        default=30, ge=0, description="How long after a lost connection `offline` is published."
    )
    receive_maximum: int = Field(
        default=256, ge=1, le=65535, description="Commands the broker may send unacknowledged."
    )
    inflight: int = Field(
        default=256, ge=1, le=65535, description="Reports published and not yet acknowledged."
    )
    reconnect_min_s: float = Field(default=1.0, gt=0, description="Shortest reconnect wait.")
    reconnect_max_s: float = Field(default=300.0, gt=0, description="Longest reconnect wait.")
    sync_s: float = Field(
        default=900.0, gt=0, description="Time between two reconciliations with the console."
    )

    @model_validator(mode="after")
    def _check(self) -> "MqttSettings":
        if not (self.tls or self.allow_plain or self.host in _LOOPBACK):
            msg = (
                f"a connection to {self.host} without TLS would show jobs and results to the "
                "network: set tls = true, or allow_plain = true if that is meant"
            )
            raise ValueError(msg)
        if (self.cert_file is None) != (self.key_file is None):
            msg = "cert_file and key_file go together"
            raise ValueError(msg)
        return self


class QueueSettings(_Section):
    """The local Redis or Valkey that carries tasks to the workers."""

    url: str | None = Field(
        default=None,
        description="Broker URL; by default the Unix socket `queue.sock` in `run_dir`.",
    )
    window_tasks: int = Field(
        default=16, ge=1, le=1024, description="Tasks in the broker and at the workers, per lane."
    )
    bundle_jobs: int = Field(
        default=32, ge=1, le=256, description="Jobs of one model in one task under load."
    )
    bundle_bytes: int = Field(
        default=262144, ge=1024, description="Bytes of job bodies in one task (one job always)."
    )
    lost_after_s: float = Field(
        default=2.5,
        gt=0,
        description="A task neither in the broker nor held by a worker for so long is sent again.",
    )
    aging_s: float = Field(
        default=60.0, gt=0, description="A waiting job gains one level of priority in this time."
    )
    retry_delay_s: float = Field(
        default=1.0, ge=0, description="Wait before a second retry; doubles, with jitter."
    )
    retry_delay_max_s: float = Field(default=300.0, gt=0, description="Longest wait of a retry.")


class StoreSettings(_Section):
    """The SQLite ledger."""

    synchronous: Literal["FULL", "NORMAL"] = Field(
        default="FULL", description="NORMAL may lose the last commits at a power cut."
    )
    keep_ends_days: int = Field(
        default=30, ge=1, description="How long ended jobs are remembered (duplicates meet them)."
    )
    keep_bodies_days: int = Field(
        default=2, ge=1, description="How long the input and result of an ended job are kept."
    )
    min_free_bytes: int = Field(
        default=64 << 20,
        ge=0,
        description="With less free disk no new work is taken (a tenth of a small disk at most).",
    )
    ballast_bytes: int = Field(
        default=8 << 20,
        ge=0,
        description="Reserve that is freed when the disk is full (a twentieth at most).",
    )


class InboxSettings(_Section):
    """Batch folders."""

    enabled: bool = Field(default=True, description="Watch the inbox folder.")
    path: Path | None = Field(default=None, description="Inbox; by default `data_dir`/inbox.")
    outbox: Path | None = Field(default=None, description="Results; by default `data_dir`/outbox.")
    settle_s: float = Field(
        default=1.0, ge=0, description="A file is complete when unchanged for so long."
    )
    scan_s: float = Field(default=1.0, gt=0, description="Time between looks at the inbox.")


class OutboxSettings(_Section):
    """Reports waiting for the console."""

    coalesce_s: float = Field(
        default=2.0,
        ge=0,
        description="Under load a state before the end may wait so long for a newer one.",
    )
    ack: Literal["auto", "console", "broker"] = Field(
        default="auto",
        description="Whose acknowledgement removes a record; auto: the broker's until a console "
        "acknowledges for the first time.",
    )
    result_bytes: int = Field(
        default=256 << 20, ge=4096, description="Results waiting for the console, all together."
    )
    result_days: int = Field(default=30, ge=1, description="Age at which a result is given up.")
    events: int = Field(default=2000, ge=10, description="Events waiting for the console.")
    telemetry: int = Field(
        default=2880,
        ge=16,
        description="Heartbeats kept while offline; then thinned.",
    )


class LimitSettings(_Section):
    """Bounds on what is accepted."""

    payload_bytes: int = Field(default=262144, ge=1024, description="Largest command payload.")
    open_jobs: int = Field(default=100_000, ge=1, description="Jobs not yet ended.")
    input_bytes: int = Field(default=64 << 20, ge=1024, description="Largest input file.")
    result_bytes: int = Field(
        default=262144, ge=1024, description="Largest result sent inline; others go to a file."
    )
    roots: tuple[Path, ...] = Field(
        default=(), description="Folders jobs may read input files from, beside the inbox."
    )
    max_attempts: int = Field(default=5, ge=1, description="Attempts of a job, if it says none.")
    run_timeout_s: float = Field(
        default=120.0, gt=0, description="Longest run of one attempt, if the job says none."
    )
    bad_commands_per_min: int = Field(
        default=60, ge=1, description="Events about bad commands; what is over is counted only."
    )


class WorkerSettings(_Section):
    """Inference workers."""

    concurrency: int | None = Field(
        default=None, ge=1, description="Tasks at a time; by default the cores of the cgroup."
    )
    cancel_grace_s: float = Field(
        default=10.0, ge=0, description="A cancelled run that goes on so long ends its process."
    )
    response_cache_mb: int = Field(
        default=0,
        ge=0,
        description="Memory for answers of models with a response cache; 0: no cache.",
    )
    response_cache_ttl_s: float = Field(
        default=0.0, ge=0, description="Age at which a cached answer is given up; 0: none."
    )
    memory_mb: int | None = Field(
        default=None,
        ge=1,
        description="Memory for loaded models, MB; by default half of the box's, and more where "
        "it is free.",
    )
    preload: tuple[str, ...] = Field(
        default=(), description="Models that are loaded at start, in the background."
    )
    pinned: tuple[str, ...] = Field(default=(), description="Models that are never evicted.")
    cache_mb: int = Field(
        default=256,
        ge=0,
        description="Disk for optimized forms of models, MB; 0: none are kept.",
    )


class UpdateSettings(_Section):
    """New versions of models (docs/lifecycle.md)."""

    enabled: bool = Field(
        default=True, description="False: `edgeward up` starts no maintenance worker."
    )
    url: str | None = Field(
        default=None,
        description="Where releases come from: https://… of a release repository, or a folder; "
        "none: bundle files and local versions only.",
    )
    root_file: Path | None = Field(
        default=None,
        description="Root metadata that says whom to trust; by default `data_dir`/trust/root.json.",
    )
    ca_file: Path | None = Field(
        default=None, description="CA certificates of the source (system's if none)."
    )
    allow_plain: bool = Field(
        default=False, description="Take releases from another machine without TLS."
    )
    allow_unsigned: bool = Field(
        default=True, description="Let `edgeward models add` add versions that nobody signed."
    )
    bytes_per_s: int | None = Field(
        default=None, ge=1024, description="Bandwidth of fetching; none: no limit."
    )
    reserve_bytes: int = Field(
        default=256 << 20, ge=0, description="Disk that fetching leaves free."
    )
    keep_versions: int = Field(
        default=3,
        ge=2,
        description="Versions of a model kept after an update; the active, the previous and a "
        "pinned one always are.",
    )
    remeasure: bool = Field(
        default=True,
        description="Measure active versions again where runtime, driver, processor, threads or "
        "power mode have changed since their choice.",
    )
    probation_s: float = Field(
        default=600.0, ge=0, description="Probation of an update that says nothing of it."
    )
    point_s: float = Field(
        default=0.4, gt=0, le=60, description="How long each batch size is measured at staging."
    )
    trial_timeout_s: float = Field(
        default=120.0, gt=0, description="Longest step of a trial at staging: a load, a run."
    )
    trial_memory_mb: int | None = Field(
        default=None,
        ge=1,
        description="Most memory of a trial at staging, MB; by default half of the box's.",
    )


class MetricsSettings(_Section):
    """The agent's metrics for Prometheus; the inference worker's are on its HTTP API."""

    host: str = Field(default="127.0.0.1", description="Address the agent's metrics are served on.")
    port: int | None = Field(
        default=None, ge=0, le=65535, description="Its TCP port; none: no metrics of the agent."
    )


class HttpSettings(_Section):
    """The inference worker's HTTP API (docs/serving.md)."""

    host: str = Field(default="127.0.0.1", description="Address the HTTP API is served on.")
    port: int | None = Field(
        default=None, ge=0, le=65535, description="Its TCP port; none: no TCP."
    )
    grpc_port: int | None = Field(
        default=None, ge=0, le=65535, description="gRPC's TCP port, on the same address; none: off."
    )
    socket: Path | None = Field(
        default=None,
        description="Its Unix socket; no token there, the file's permissions say who may.",
    )
    token: SecretStr | None = Field(default=None, description="Bearer token; better a file.")
    token_file: Path | None = Field(default=None, description="File holding the bearer token.")
    cert_file: Path | None = Field(default=None, description="Server certificate, PEM: TLS.")
    key_file: Path | None = Field(default=None, description="Server certificate's key, PEM.")
    allow_plain: bool = Field(
        default=False, description="Allow other machines in without a token or without TLS."
    )
    cors_origins: tuple[str, ...] = Field(
        default=(), description="Web origins whose pages may use the API."
    )
    body_bytes: int = Field(
        default=64 << 20, ge=1024, description="Largest request body, also when decompressed."
    )
    held_bytes: int = Field(
        default=256 << 20, ge=1024, description="Request bodies under way, all together."
    )
    requests: int = Field(default=512, ge=1, description="Requests under way; more get a 503.")
    body_timeout_s: float = Field(
        default=30.0, gt=0, description="Longest pause in the sending of a body."
    )
    keep_alive_s: float = Field(
        default=75.0, ge=1, description="How long an idle connection is kept."
    )
    stop_timeout_s: float = Field(
        default=10.0, ge=1, description="How long requests under way may take at a stop."
    )
    access_log: bool = Field(default=False, description="Log each request.")

    @model_validator(mode="after")
    def _check(self) -> "HttpSettings":
        if (self.cert_file is None) != (self.key_file is None):
            msg = "cert_file and key_file go together"
            raise ValueError(msg)
        if self.token is not None and not self.token.get_secret_value():
            msg = "token is empty"
            raise ValueError(msg)
        has_token = self.token is not None or self.token_file is not None
        is_safe = has_token and self.cert_file is not None
        is_open = self.port is not None or self.grpc_port is not None
        if is_open and not (is_safe or self.allow_plain or _is_local(self.host)):
            msg = (
                f"an API on {self.host} would be open to the network: set token_file, cert_file "
                "and key_file, or allow_plain = true if that is meant"
            )
            raise ValueError(msg)
        return self


def _is_local(host: str) -> bool:
    return host in _LOOPBACK or host.startswith("127.")
