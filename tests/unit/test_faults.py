"""Fault points end a process in a checkout that asks for it, and never anywhere else."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import agent.faults
from agent.faults import VARIABLE

PASS_THREE = "from agent.faults import reach; [(reach('a.b'), print(n)) for n in range(3)]"


def pass_three(folder: Path, fault: str) -> tuple[int, str]:
    """Pass one point three times in a process of its own; return its exit and what it did."""
    done = subprocess.run(
        [sys.executable, "-c", PASS_THREE],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder), VARIABLE: fault},
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert done.stderr == ""
    return done.returncode, done.stdout


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of the one module, with the folder beside it that makes it a test build."""
    (tmp_path / "agent").mkdir()
    # Without it an installed `agent` would win over this one.
    (tmp_path / "agent" / "__init__.py").touch()
    shutil.copy(agent.faults.__file__, tmp_path / "agent" / "faults.py")
    (tmp_path / "tests" / "fault").mkdir(parents=True)
    return tmp_path


@pytest.mark.parametrize(
    ("fault", "passed"), [("a.b", ""), ("a.b:1", ""), ("a.b:2", "0\n"), ("a.b:3", "0\n1\n")]
)
def test_process_ends_at_the_passing_that_was_asked_for(
    checkout: Path, fault: str, passed: str
) -> None:
    assert pass_three(checkout, fault) == (-signal.SIGKILL, passed)


@pytest.mark.parametrize("fault", ["", "a.c", "a", "a.b.c", "a.b:4"])
def test_other_points_and_later_passings_end_nothing(checkout: Path, fault: str) -> None:
    assert pass_three(checkout, fault) == (0, "0\n1\n2\n")


def test_installed_product_ignores_the_variable(checkout: Path) -> None:
    (checkout / "tests" / "fault").rmdir()
    assert pass_three(checkout, "a.b") == (0, "0\n1\n2\n")
