"""What this machine is, found out once for all the boxes of a test process.

Proving the runtimes costs seconds of CPU, 4 of them for torch alone: each test's box would pay
for it again, in its first job's time.
"""

import json
import tempfile
from functools import cache
from pathlib import Path

from agent.platformfile import PLATFORM_FILE, detect_and_save
from platforms.runtimes.proof import prove_runtime
from platforms.spec import Arch, Os, PlatformSpec, RuntimeFinding


@cache
def _detect() -> str:
    with tempfile.TemporaryDirectory() as folder:
        detect_and_save(Path(folder))
        return (Path(folder) / PLATFORM_FILE).read_text(encoding="utf-8")


def seed_platform(data_dir: Path, *only: str) -> None:
    """Let the box in `data_dir` find what it is on file.

    Args:
        data_dir: of the box.
        only: names of the runtimes it has, a test's own among them; none: those of this machine.
    """
    data_dir.mkdir(parents=True, exist_ok=True)
    document = json.loads(_detect())
    if only:
        document["platform"]["runtimes"] = [
            {"name": name, "status": "proven", "version": "1", "providers": [], "detail": ""}
            for name in only
        ]
    (data_dir / PLATFORM_FILE).write_text(json.dumps(document), encoding="utf-8")


def describe_box(cores: int = 2, runtime: RuntimeFinding | None = None) -> PlatformSpec:
    """Return a made-up box with one runtime; None: ONNX Runtime, proven here and now."""
    return PlatformSpec(
        os=Os.LINUX,
        os_version="",
        arch=Arch.X86_64,
        cpu_model="",
        cpu_flags=(),
        cores=float(cores),
        cores_machine=cores,
        memory_mb=4000,
        memory_machine_mb=4000,
        python_version="3.11",
        runtimes=(runtime or prove_runtime("ort"),),
    )
