"""The parent's hold on a child that hangs, dies or is asked for the impossible."""

import importlib
from pathlib import Path

import psutil
import pytest

from platforms.errors import MeasuringError
from platforms.measuring.measurer import Measurer
from tests.harness.wild_runtime import install_wild_runtime

DIGITS = Path(__file__).parents[2] / "console" / "models" / "digits" / "digits.onnx"


@pytest.fixture
def wild_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for a model's file, where the runtime `wild` is installed."""
    install_wild_runtime(tmp_path / "site")
    monkeypatch.syspath_prepend(tmp_path / "site")
    importlib.invalidate_caches()
    return tmp_path


def copy(path: Path) -> str:
    path.write_bytes(DIGITS.read_bytes())
    return str(path)


def find_children() -> list[psutil.Process]:
    return [
        item
        for item in psutil.Process().children(recursive=True)
        if item.status() != psutil.STATUS_ZOMBIE and "platforms.measuring.child" in item.cmdline()
    ]


def test_runtime_that_hangs_is_given_up_and_its_process_ended(wild_file: Path) -> None:
    request = {"do": "load", "runtime": "wild", "file": copy(wild_file / "hang.onnx"), "threads": 1}
    with Measurer(1.0) as child, pytest.raises(MeasuringError, match="no answer within 1 s"):
        child.ask(request)
    assert find_children() == []


def test_child_that_died_says_so_to_every_later_question(wild_file: Path) -> None:
    file = copy(wild_file / "abort.onnx")
    request = {"do": "load", "runtime": "wild", "file": file, "threads": 1}
    with Measurer() as child:
        with pytest.raises(MeasuringError, match=r"SIGABRT .wild: something terrible"):
            child.ask(request)
        with pytest.raises(MeasuringError):
            child.ask({"do": "measure", "concurrency": 1, "batch": 1, "seconds": 0.1})


def test_library_that_talks_on_standard_output_does_not_disturb(wild_file: Path) -> None:
    file = copy(wild_file / "calm.onnx")
    with Measurer() as child:
        loaded = child.ask({"do": "load", "runtime": "wild", "file": file, "threads": 1})
    assert [item["name"] for item in loaded["inputs"]] == ["pixels"]


def test_refusal_of_the_runtime_keeps_the_child(wild_file: Path) -> None:
    request = {"do": "load", "runtime": "ort", "threads": 1}
    with Measurer() as child:
        with pytest.raises(MeasuringError, match="there is no model file"):
            child.ask({**request, "file": str(wild_file / "nosuch.onnx")})
        assert child.ask({**request, "file": str(DIGITS)})["provider"] == "CPUExecutionProvider"
