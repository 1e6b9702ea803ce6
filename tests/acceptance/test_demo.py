"""The demo, run as a newcomer runs it."""

import json
import re
from pathlib import Path

import psutil

from tests.harness.commands import run_edgeward


def find_processes(part: str) -> list[psutil.Process]:
    found = psutil.process_iter(["cmdline"])
    # Of a process that has just ended there is no command line.
    words = ((process, process.info["cmdline"] or ()) for process in found)
    return [process for process, line in words if any(part in word for word in line)]


def test_demo_passes_every_step_and_leaves_nothing_running(tmp_path: Path) -> None:
    data_dir = tmp_path / "box"

    done = run_edgeward("demo", "--data-dir", data_dir)

    assert done.returncode == 0, done.stdout + done.stderr
    last = done.stdout.rstrip().splitlines()[-1]
    match = re.fullmatch(r"demo: (\d+) of (\d+) steps passed", last)
    assert match is not None, last
    assert match[1] == match[2]
    assert done.stdout.count("✓") == int(match[2])
    assert find_processes(str(data_dir)) == []
    files = list((data_dir / "outbox" / "magika").glob("*.jsonl"))
    lines = [json.loads(line) for path in files for line in path.read_text().splitlines()]
    assert len({line["file"] for line in lines}) == len(lines) == 40
    assert all(line["state"] == "succeeded" for line in lines)


def test_demo_that_cannot_make_its_folders_ends_with_an_error(tmp_path: Path) -> None:
    # A run folder that is a file: nothing can be started there.
    (tmp_path / "run").write_text("in the way")
    done = run_edgeward("demo", "--data-dir", tmp_path, "--json")
    assert done.returncode == 1
    assert json.loads(done.stdout)["error"]["code"] == "os_error"
