"""Runtimes that crash, hang, lie or are missing each become a finding."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from platforms.artifact import ArtifactFormat
from platforms.errors import RuntimeMissingError
from platforms.runtimes.base import PROOF_ANSWER_FILE
from platforms.runtimes.proof import prove_runtime, prove_runtimes
from platforms.runtimes.registry import BUILT_IN, RUNTIME_FORMATS, get_runtime, read_registry
from platforms.spec import RuntimeFinding, RuntimeStatus

ENTRIES = """
from platforms.artifact import ArtifactFormat
from platforms.runtimes.registry import RuntimeEntry

def declare(name):
    formats = frozenset({ArtifactFormat.TFLITE})
    return RuntimeEntry(name, f"acme_runtimes:{name.title()}", formats, "acme")

aborting, hanging, lying, silent, absent, right, unproven = map(
    declare, ["aborting", "hanging", "lying", "silent", "absent", "right", "unproven"]
)
taken = declare("ort")
no_entry = "a string"
"""

RUNTIMES = """
import json, os, sys, threading
from pathlib import Path
import numpy as np
from platforms.artifact import ArtifactFormat, Datatype, TensorSpec
from platforms.runtimes.base import PROOF_ANSWER_FILE, Runtime, Session

class Answering(Session):
    def __init__(self, offset):
        super().__init__("acme", "acme", (TensorSpec("x", Datatype.FP32, (-1, 1, 8, 8)),), ())
        self.offset = offset
    def _run(self, inputs, stop):
        y = json.loads(PROOF_ANSWER_FILE.read_text())["outputs"]["y"]
        return {"y": np.asarray(y, np.float32) + np.float32(self.offset)}
    def close(self):
        pass

class Base(Runtime):
    name, extra, formats = "acme", "acme", frozenset({ArtifactFormat.TFLITE})
    offset = 0.0
    def version(self):
        return "1.2.3"
    def providers(self):
        return ("acme-cpu",)
    def _load(self, path, options):
        return Answering(self.offset)
    def get_proof_model(self):
        return Path(__file__)

class Right(Base):
    pass
class Lying(Base):
    offset = 0.5
class Aborting(Base):
    def _load(self, path, options):
        os.abort()
class Hanging(Base):
    def _load(self, path, options):
        threading.Event().wait()
class Silent(Base):
    def _load(self, path, options):
        sys.exit(0)
class Absent(Base):
    def version(self):
        return self.import_library("acme_library_that_is_not_there").__version__
class Unproven(Base):
    formats = frozenset({ArtifactFormat.SAVED_MODEL})
    get_proof_model = Runtime.get_proof_model
"""

POINTS = """
[edgeward.runtimes]
aborting = acme_entries:aborting
hanging = acme_entries:hanging
lying = acme_entries:lying
silent = acme_entries:silent
absent = acme_entries:absent
right = acme_entries:right
unproven = acme_entries:unproven
ort = acme_entries:taken
odd = acme_entries:no_entry
unreadable = acme_entries:no_such_name
"""


@pytest.fixture
def distribution(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A distribution that announces runtimes of its own, as pip leaves it in a site folder."""
    (tmp_path / "acme_entries.py").write_text(ENTRIES, encoding="utf-8")
    (tmp_path / "acme_runtimes.py").write_text(RUNTIMES, encoding="utf-8")
    info = tmp_path / "acme_runtimes-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme-runtimes\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(POINTS)
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    return tmp_path


@pytest.mark.parametrize("name", ["ort", "litert", "openvino", "torchscript", "v2"])
def test_built_in_runtimes_are_proven_here(name: str) -> None:
    found = prove_runtime(name, timeout_s=100)
    assert found.status is RuntimeStatus.PROVEN, found.detail


@pytest.mark.parametrize("name", ["coreml"] if sys.platform != "darwin" else [])
def test_core_ml_is_missing_where_there_is_no_macos(name: str) -> None:
    found = prove_runtime(name)
    assert found.status is RuntimeStatus.MISSING
    assert "macOS only" in found.detail


def test_onnxruntime_is_proven_with_version_and_providers() -> None:
    found = prove_runtime("ort")
    assert found.status is RuntimeStatus.PROVEN, found.detail
    assert found.version == get_runtime("ort").version()
    assert "CPUExecutionProvider" in found.providers


@pytest.mark.usefixtures("distribution")
def test_user_s_runtime_is_proven_like_a_built_in_one() -> None:
    right = RuntimeFinding("right", RuntimeStatus.PROVEN, "1.2.3", ("acme-cpu",))
    assert prove_runtime("right") == right
    assert RUNTIME_FORMATS["right"] == {ArtifactFormat.TFLITE}
    assert {"ort", "right"} <= set(RUNTIME_FORMATS)
    assert get_runtime("right").version() == "1.2.3"


@pytest.mark.usefixtures("distribution")
@pytest.mark.parametrize(
    ("name", "status", "words"),
    [
        ("aborting", RuntimeStatus.BROKEN, "SIGABRT"),
        ("lying", RuntimeStatus.BROKEN, "off by 0.5"),
        ("silent", RuntimeStatus.BROKEN, "without a report"),
        ("absent", RuntimeStatus.MISSING, "pip install 'edgeward[acme]'"),
        ("unproven", RuntimeStatus.BROKEN, "no proof model for saved_model"),
        ("nonesuch", RuntimeStatus.BROKEN, "there is no runtime"),
    ],
)
def test_runtime_that_fails_is_a_finding(name: str, status: RuntimeStatus, words: str) -> None:
    found = prove_runtime(name)
    assert (found.name, found.status) == (name, status)
    assert words in found.detail


@pytest.mark.usefixtures("distribution")
def test_runtime_that_hangs_is_a_finding_after_the_time_limit() -> None:
    found = prove_runtime("hanging", timeout_s=3)
    assert found.status is RuntimeStatus.BROKEN
    assert "no answer within 3 s" in found.detail


@pytest.mark.usefixtures("distribution")
def test_one_pass_reports_all_of_them_and_the_entries_that_cannot_be_read() -> None:
    found = {one.name: one for one in prove_runtimes(timeout_s=5)}
    proven = {name for name, one in found.items() if one.status is RuntimeStatus.PROVEN}
    # Not every built-in one within so short a time: torch takes seconds to import.
    assert {"ort", "right"} <= proven <= {entry.name for entry in BUILT_IN} | {"right"}
    assert "no_such_name" in found["unreadable"].detail
    assert "must name a RuntimeEntry" in found["odd"].detail
    taken = next(one for name, one in found.items() if name.startswith("ort ("))
    assert taken.detail == "the name ort is taken"
    assert found["absent"].status is RuntimeStatus.MISSING


@pytest.mark.usefixtures("distribution")
def test_entry_that_cannot_be_read_hides_no_other_and_says_so_when_asked_for() -> None:
    assert "unreadable" in read_registry().faults
    assert "right" in read_registry().entries
    with pytest.raises(RuntimeMissingError, match="no_such_name"):
        get_runtime("unreadable")


def test_asking_for_findings_imports_neither_numpy_nor_a_runtime() -> None:
    code = (
        "import sys; from platforms.runtimes.proof import prove_runtime;"
        "print(prove_runtime('ort').status.value,"
        " sorted({'numpy', 'onnxruntime'} & sys.modules.keys()))"
    )
    root = Path(__file__).parents[2]
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True
    )
    assert ran.stdout.strip() == "proven []"


def test_recorded_answer_has_both_rows_and_is_finite() -> None:
    answer = json.loads(PROOF_ANSWER_FILE.read_text(encoding="utf-8"))
    assert [len(row) for row in answer["outputs"]["y"]] == [10, 10]
    assert max(abs(value) for row in answer["outputs"]["y"] for value in row) > 1
