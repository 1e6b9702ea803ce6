import re
import subprocess
from pathlib import Path

import pytest

from console.embedded import prepare_queue_broker
from tests.conftest import require_binary

UNITS = Path(__file__).parents[2] / "systemd"
SERVICES = sorted(path.name for path in UNITS.glob("*.service"))


def sections(unit: str) -> dict[str, list[str]]:
    """Read a unit as `section.key` and its values; configparser refuses repeated keys."""
    found: dict[str, list[str]] = {}
    section = ""
    for line in (UNITS / unit).read_text().splitlines():
        if match := re.fullmatch(r"\[(\w+)\]", line):
            section = match[1]
        elif match := re.fullmatch(r"(\w+)=(.*)", line):
            found.setdefault(f"{section}.{match[1]}", []).append(match[2])
    return found


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """The units, with a program that exists everywhere in place of ours."""
    for path in UNITS.iterdir():
        if path.suffix in {".service", ".target"}:
            text = re.sub(
                r"(?<=^ExecStart=)/opt/edgeward/bin/edgeward",
                "/bin/true",
                path.read_text(),
                flags=re.M,
            )
            (tmp_path / path.name).write_text(text)
    return tmp_path


def test_systemd_finds_no_fault_in_the_units(installed: Path) -> None:
    verify = [require_binary("systemd-analyze"), "verify", "--man=no"]
    lanes = [f"edgeward-worker@{lane}.service" for lane in ("inference", "batch", "maintenance")]
    units = ["edgeward.target", "edgeward-agent.service", "edgeward-queue.service", *lanes]

    done = subprocess.run(
        [*verify, *units],
        cwd=installed,
        env={"SYSTEMD_UNIT_PATH": f"{installed}:", "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
    )

    ours = [line for line in done.stderr.splitlines() if "edgeward" in line]
    assert ours == []
    assert done.returncode == 0, done.stderr


def test_systemd_finds_a_planted_fault(installed: Path) -> None:
    analyze = require_binary("systemd-analyze")
    unit = installed / "edgeward-agent.service"
    unit.write_text(unit.read_text().replace("WatchdogSec=30", "WatchdogSec=soon"))

    done = subprocess.run(
        [analyze, "verify", "--man=no", unit.name], cwd=installed, capture_output=True, text=True
    )

    assert "edgeward-agent.service:" in done.stderr
    assert "soon" in done.stderr


@pytest.mark.parametrize("unit", SERVICES)
def test_a_service_is_restarted_for_ever_and_does_not_run_as_root(unit: str) -> None:
    settings = sections(unit)

    assert settings["Service.Restart"] == ["always"]
    assert settings["Unit.StartLimitIntervalSec"] == ["0"]
    assert settings["Service.User"] == ["edgeward"]
    assert settings["Service.NoNewPrivileges"] == ["yes"]
    assert settings["Service.Type"] == ["notify"]


@pytest.mark.parametrize("unit", ["edgeward-agent.service", "edgeward-worker@.service"])
def test_a_hung_process_is_aborted_so_that_its_stacks_are_written(unit: str) -> None:
    settings = sections(unit)

    assert settings["Service.WatchdogSignal"] == ["SIGABRT"]
    assert int(settings["Service.WatchdogSec"][0]) > 0
    assert settings["Service.NotifyAccess"] == ["main"]


@pytest.mark.parametrize("unit", SERVICES)
def test_stopping_one_service_leaves_the_socket_of_the_others(unit: str) -> None:
    settings = sections(unit)

    assert settings["Service.RuntimeDirectory"] == ["edgeward"]
    assert settings["Service.RuntimeDirectoryPreserve"] == ["yes"]


def test_the_user_of_the_services_is_created(tmp_path: Path) -> None:
    sysusers = require_binary("systemd-sysusers")
    (tmp_path / "etc").mkdir()

    subprocess.run([sysusers, f"--root={tmp_path}", UNITS / "edgeward.sysusers"], check=True)

    assert "\nedgeward:" in f"\n{(tmp_path / 'etc' / 'passwd').read_text()}"


def read_settings(text: str) -> dict[str, str]:
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return dict(line.split(" ", 1) for line in lines)


def test_the_queue_of_systemd_and_of_one_box_have_the_same_settings(tmp_path: Path) -> None:
    shipped = read_settings((UNITS / "edgeward-queue.conf").read_text())
    broker = prepare_queue_broker(tmp_path)
    embedded = read_settings(Path(broker.argv[-1]).read_text())

    assert shipped.pop("supervised") == "systemd"
    for places in (shipped, embedded):
        del places["dir"], places["unixsocket"]
    assert shipped == embedded


def test_a_real_server_accepts_the_shipped_queue_settings(tmp_path: Path) -> None:
    settings = tmp_path / "queue.conf"
    text = (UNITS / "edgeward-queue.conf").read_text()
    settings.write_text(text.replace("/run/edgeward", str(tmp_path)))
    redis_server = require_binary("redis-server")
    # An unknown directive ends the server at once; so does this, after all were read.
    last = [redis_server, str(settings), "--port", "no-number"]

    done = subprocess.run(last, capture_output=True, text=True)

    assert "no-number" in done.stdout + done.stderr


def test_the_folder_is_no_python_package() -> None:
    assert not list(UNITS.glob("*.py"))
