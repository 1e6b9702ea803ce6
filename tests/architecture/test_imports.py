"""What a fresh interpreter has loaded after importing our processes' modules."""

import json
import subprocess
import sys

import pytest

from tests.architecture.documents import ROOT

_ML_LIBRARIES = {
    "ai_edge_litert",
    "coremltools",
    "numpy",
    "onnx",
    "onnxruntime",
    "openvino",
    "tensorflow",
    "tflite_runtime",
    "torch",
}


def import_fresh(module: str) -> set[str]:
    """Return the top-level modules that importing `module` loads in a new interpreter."""
    code = (
        f"import {module}, json, sys; print(json.dumps(sorted({{n.partition('.')[0] "
        "for n in sys.modules})))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout))


def test_agent_process_loads_no_ml_library_and_no_migration_tool() -> None:
    loaded = import_fresh("agent.daemon.supervisor")

    assert "sqlalchemy" in loaded, "the probe sees nothing"
    assert loaded & (_ML_LIBRARIES | {"alembic"}) == set()


@pytest.mark.parametrize("module", ["agent.repository", "agent.platformfile", "agent.manifest"])
def test_what_agent_and_worker_share_loads_no_ml_library(module: str) -> None:
    assert import_fresh(module) & _ML_LIBRARIES == set()


def test_worker_loads_its_runtime_with_the_first_model_and_not_before() -> None:
    assert "onnxruntime" not in import_fresh("worker.app")


def test_knowing_the_runtimes_loads_none_of_them() -> None:
    assert import_fresh("platforms.runtimes.registry") & _ML_LIBRARIES == set()
