"""The doctor's report: its exit code, its JSON and its table."""

import io
import json

import pytest
from rich.console import Console

from console.doctor import DoctorReport, render
from platforms.preflight import Check, CheckStatus
from tests.unit.recorded import detect_recorded

OK = Check("os", CheckStatus.OK, "Debian 12, aarch64")
WARN = Check("clock", CheckStatus.WARN, "not synchronised", "start a time service")
FAIL = Check("runtimes", CheckStatus.FAIL, "ort missing", "pip install 'edgeward[onnx]'")


@pytest.mark.parametrize(
    ("checks", "exit_code"),
    [((), 0), ((OK,), 0), ((OK, WARN), 0), ((OK, WARN, FAIL), 1)],
)
def test_only_a_failure_makes_the_exit_code_1(checks: tuple[Check, ...], exit_code: int) -> None:
    assert DoctorReport(detect_recorded("rpi4"), checks).exit_code == exit_code


def test_json_holds_the_checks_and_the_platform() -> None:
    report = DoctorReport(detect_recorded("rpi4"), (OK, FAIL))
    data = json.loads(json.dumps(report.to_json()))
    assert data["exit_code"] == 1
    assert data["checks"][1] == {
        "name": "runtimes",
        "status": "fail",
        "summary": "ort missing",
        "remedy": "pip install 'edgeward[onnx]'",
    }
    assert data["platform"]["hardware_class"] == "rpi4"


def test_table_shows_findings_and_remedies_with_their_brackets() -> None:
    output = io.StringIO()
    Console(file=output, width=100).print(render([OK, WARN, FAIL], detect_recorded("rpi4")))
    text = output.getvalue()
    assert "Raspberry Pi 4 Model B Rev 1.4" in text
    assert "→ start a time service" in text
    assert "→ pip install 'edgeward[onnx]'" in text
    assert [line.split()[0] for line in text.splitlines() if line[:4].strip() in {"ok", "warn"}]
