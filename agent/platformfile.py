"""What this box was found to be, kept in one file so that nobody has to look again.

The agent writes it; workers and the command line read it. Looking costs seconds
(each runtime is proven in a child process), so it is done again only when the
installed packages or the machine's boot have changed, or on request.
"""

import fcntl
import hashlib
import importlib.metadata
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from agent.clock import SystemClock
from agent.fileio import write_atomic
from platforms.spec import PlatformSpec

log = logging.getLogger(__name__)

PLATFORM_FILE = "platform.json"
_LOCK_FILE = "platform.lock"
_RUNTIME_PACKAGES = (
    "onnxruntime",
    "onnxruntime-gpu",
    "ai-edge-litert",
    "tflite-runtime",
    "openvino",
    "torch",
    "coremltools",
    "numpy",
    "edgeward",
)


def _fingerprint() -> str:
    versions = []
    for name in _RUNTIME_PACKAGES:
        try:
            versions.append(f"{name}={importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    text = ",".join([*versions, SystemClock().boot_id()])
    return hashlib.sha256(text.encode()).hexdigest()


def find_platform(data_dir: Path) -> PlatformSpec | None:
    """Return what is on file, or None where nothing is, or it is out of date or damaged."""
    try:
        document = json.loads((data_dir / PLATFORM_FILE).read_text(encoding="utf-8"))
        if document["fingerprint"] != _fingerprint():
            return None
        return PlatformSpec.from_json(document["platform"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def detect_and_save(data_dir: Path) -> PlatformSpec:
    """Look at the box, prove its runtimes, and keep what was found. Blocks some seconds."""
    from platforms.detect import detect_platform
    from platforms.probe import probe_box
    from platforms.runtimes.proof import prove_runtimes

    data_dir.mkdir(parents=True, exist_ok=True)
    spec = detect_platform(probe_box(data_dir), prove_runtimes())
    document = {"fingerprint": _fingerprint(), "platform": spec.to_json()}
    write_atomic(data_dir / PLATFORM_FILE, json.dumps(document, indent=2) + "\n")
    log.info("this box is %s", spec.hardware_class)
    return spec


def load_platform(data_dir: Path) -> PlatformSpec:
    """Return what is on file where it is up to date, else look at the box now.

    Of several processes that ask at once, such as all of a box's first start, one looks and the
    others wait for it.
    """
    return find_platform(data_dir) or _load_alone(data_dir)


def _load_alone(data_dir: Path) -> PlatformSpec:
    with _hold(data_dir):
        return find_platform(data_dir) or detect_and_save(data_dir)


@contextmanager
def _hold(data_dir: Path) -> Iterator[None]:
    """Hold the box's lock on looking, which the kernel lets go when this process ends."""
    data_dir.mkdir(parents=True, exist_ok=True)
    with (data_dir / _LOCK_FILE).open("a", encoding="ascii") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def look_at_box(data_dir: Path) -> PlatformSpec:
    """Return what the box is, without any runtime: a tenth of a second."""
    from platforms.detect import detect_platform
    from platforms.probe import probe_box

    return detect_platform(probe_box(data_dir), ())
