"""The doctor: one report on whether this box is fit, and what to do where it is not.

Owns putting together what others find out: the probe and preflight of `platforms`, the
proof of the runtimes, the two brokers. Changes nothing on the box apart from a temporary
file in the data folder and an MQTT session that it removes again.
"""

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from agent.config import Settings
from console.broker_checks import MqttTarget, check_mqtt, check_queue
from platforms.detect import detect_platform
from platforms.preflight import Check, CheckStatus, check_platform
from platforms.probe import probe_box, probe_fsync
from platforms.spec import PlatformSpec

_COLOURS = {CheckStatus.OK: "green", CheckStatus.WARN: "yellow", CheckStatus.FAIL: "red"}


@dataclass(frozen=True)
class DoctorTargets:
    """What to examine besides the box itself, as plain values of the settings."""

    data_dir: Path
    queue_url: str | None = None
    """None where no queue broker is to be checked."""
    mqtt: MqttTarget | None = None
    """None where MQTT is turned off."""


@dataclass(frozen=True)
class DoctorReport:
    """The box and every check of it, in reading order."""

    spec: PlatformSpec
    checks: tuple[Check, ...]

    @property
    def exit_code(self) -> int:
        """Return 1 where any check failed, else 0; warnings do not count."""
        return int(any(check.status is CheckStatus.FAIL for check in self.checks))

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-ready form: `{"exit_code", "checks": […], "platform": {…}}`."""
        return {
            "exit_code": self.exit_code,
            "checks": [asdict(check) for check in self.checks],
            "platform": self.spec.to_json(),
        }


def choose_targets(settings: Settings) -> DoctorTargets:
    """Return what of a box with these settings is to be examined."""
    wanted = settings.mqtt
    target = MqttTarget(
        host=wanted.host,
        port=wanted.port,
        tls=wanted.tls,
        username=wanted.username,
        password=settings.password(),
        ca_file=wanted.ca_file,
        cert_file=wanted.cert_file,
        key_file=wanted.key_file,
        device_id=settings.device_id,
    )
    return DoctorTargets(settings.data_dir, settings.queue_url, target if wanted.enabled else None)


def collect(targets: DoctorTargets) -> DoctorReport:
    """Examine the box, its runtimes and its brokers.

    Runs each installed runtime once in a child process, which takes seconds; the other
    checks end within 3 s each. Never raises for what it finds.
    """
    # Proving a runtime is the one slow import; `edgeward --help` should not pay for it.
    from platforms.runtimes.proof import prove_runtimes

    probe = probe_box(targets.data_dir)
    spec = detect_platform(probe, prove_runtimes())
    checks = check_platform(spec, probe, probe_fsync(targets.data_dir))
    return DoctorReport(spec, (*checks, *check_brokers(targets)))


def run_checks(targets: DoctorTargets) -> list[Check]:
    """Return the checks of `collect` alone."""
    return list(collect(targets).checks)


def check_brokers(targets: DoctorTargets) -> tuple[Check, ...]:
    """Check the brokers that are configured."""
    checks = []
    if targets.queue_url is not None:
        checks.append(check_queue(targets.queue_url))
    if targets.mqtt is not None:
        checks.append(check_mqtt(targets.mqtt))
    return tuple(checks)


def render(checks: Sequence[Check], spec: PlatformSpec) -> RenderableType:
    """Return the box's description and a table of checks, for a terminal."""
    return Group(_render_spec(spec), _render_checks(checks))


def print_report(report: DoctorReport) -> None:
    """Write the report to standard output."""
    Console(file=sys.stdout).print(render(report.checks, report.spec))


def _render_spec(spec: PlatformSpec) -> Table:
    table = Table.grid(padding=(0, 2))
    accelerators = ", ".join(found.name for found in spec.accelerators if found.usable) or "none"
    rows = (
        ("Class", spec.hardware_class),
        ("Board", spec.board or "unknown"),
        ("CPU", f"{spec.cpu_model}, {spec.cores:g} of {spec.cores_machine} cores"),
        ("Memory", f"{spec.memory_mb} of {spec.memory_machine_mb} MB"),
        ("Accelerators", accelerators),
    )
    for name, value in rows:
        table.add_row(Text(name, style="bold"), Text(value))
    return table


def _render_checks(checks: Sequence[Check]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0))
    for header in ("", "Check", "Finding"):
        table.add_column(header, overflow="fold")
    for check in checks:
        # `Text`, not markup: rich would swallow the brackets of `edgeward[onnx]`.
        finding = Text(check.summary)
        if check.remedy:
            finding.append(f"\n→ {check.remedy}", style="italic")
        status = Text(check.status.value, style=_COLOURS[check.status])
        table.add_row(status, Text(check.name), finding)
    return table
