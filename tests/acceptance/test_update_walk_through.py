"""README, "Update a model, then break it", run as it stands there."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from agent.repository import ModelRepository
from tests.architecture.documents import ROOT
from tests.harness.commands import UpProcess, clean_environment

_BLOCK = re.compile(r"^```sh update-walk-through\n(.*?)^```$", re.M | re.S)


@pytest.mark.timeout(240)
def test_update_walk_through_does_what_readme_says(tmp_path: Path) -> None:
    [script] = _BLOCK.findall((ROOT / "README.md").read_text(encoding="utf-8"))
    (tmp_path / "console").symlink_to(ROOT / "console")
    box = tmp_path / "box"
    up = UpProcess(box, "demo-box", EDGEWARD_UPDATES__URL=str(tmp_path / "repo"))
    try:
        added = up.run("models", "add", "digits", ROOT / "console" / "models" / "digits")
        assert added.returncode == 0, added.stderr
        programs = str(Path(sys.executable).parent)
        environment = clean_environment(
            {
                "EDGEWARD_DATA_DIR": str(box),
                "EDGEWARD_DEVICE_ID": "demo-box",
                "PATH": os.pathsep.join([programs, os.environ["PATH"]]),
                "PYTHONPATH": str(ROOT),
            }
        )
        done = subprocess.run(
            ["sh", "-e", "-c", script],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=200,
        )
        assert done.returncode == 0, f"{done.stdout}{done.stderr}{up.read_log()}"
    finally:
        up.stop()
    assert "digits 2.0.0: succeeded: the new version serves" in done.stdout
    assert "agreement 0.1" in done.stdout + done.stderr
    assert "refused, and 2.0.0 serves on" in done.stdout
    versions = ModelRepository(box / "models").list_versions("digits")
    assert [one.release for one in versions if one.is_active] == ["1.0.0"]
