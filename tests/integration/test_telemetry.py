"""No runtime tells anybody about this box: none leaves a queue of reports behind."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from platforms.runtimes.registry import read_registry
from tests.architecture.documents import ROOT

# Nothing else: onnxruntime keeps its reports below HOME, and none where a variable says that it is
# tested.
KEPT = ("PATH", "LANG", "LD_LIBRARY_PATH", "VIRTUAL_ENV")


def run(code: str, home: Path) -> list[str]:
    """Run a program with a home of its own, and return what it left there."""
    home.mkdir()
    kept = {key: os.environ[key] for key in KEPT if key in os.environ}
    env = {**kept, "HOME": str(home), "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code], env=env, check=True, timeout=120)
    return sorted(str(path.relative_to(home)) for path in home.rglob("*") if path.is_file())


@pytest.mark.parametrize("name", [name for name in read_registry().entries if name != "v2"])
def test_runtime_leaves_no_reports_behind(name: str, tmp_path: Path) -> None:
    code = f"from platforms.runtimes.proof import _run_child; print(_run_child({name!r}))"
    assert run(code, tmp_path / "home") == []


def test_onnxruntime_would_report_if_it_were_let(tmp_path: Path) -> None:
    code = (
        "import onnxruntime\n"
        "from platforms.runtimes.base import PROOF_FOLDER\n"
        "onnxruntime.InferenceSession(str(PROOF_FOLDER / 'proof.onnx'))"
    )
    assert run(code, tmp_path / "loose")
    entry = "from platforms.telemetry import forbid_telemetry; forbid_telemetry()\n"
    assert run(entry + code, tmp_path / "kept") == []
