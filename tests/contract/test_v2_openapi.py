"""Schemathesis plays requests made from our own OpenAPI document: nothing it checks may fail."""

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness.v2_models import Box, serve_models

# Every path leads to one model that is there: what the schema allows and the model does not take is
# a 400, what Triton's API has and ours has not a 501, and after an `unload` comes a 503.
_WITH_A_MODEL = """
[parameters]
model = "simple"
version = "1"

[checks.positive_data_acceptance]
expected-statuses = ["2xx", 400, 404, 501, 503]

[checks.not_a_server_error]
expected-statuses = ["2xx", "4xx", 501, 503]
"""


@pytest.fixture(scope="module")
def box(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Box]:
    with serve_models(tmp_path_factory.mktemp("openapi")) as box:
        yield box


def find_schemathesis() -> str:
    beside = Path(sys.executable).with_name("schemathesis")
    found = str(beside) if beside.exists() else shutil.which("schemathesis")
    if found is None:
        pytest.skip("schemathesis is not installed: it is in the extra `dev`")
    return found


@pytest.mark.parametrize("config", ["", _WITH_A_MODEL], ids=["defaults", "with-a-model"])
def test_api_keeps_what_its_document_says(box: Box, tmp_path: Path, config: str) -> None:
    (tmp_path / "schemathesis.toml").write_text(config, encoding="utf-8")
    done = subprocess.run(
        [
            *(find_schemathesis(), "run", f"http://{box.url}/openapi.json"),
            *("--max-examples", "5", "--seed", "1", "--no-color"),
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
