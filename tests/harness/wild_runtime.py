"""A user's runtime that misbehaves, installed for one test: it kills its process, hangs or fails.

What it does is in the file's name, so that the proof of the runtime, which uses another file,
finds nothing wrong with it. A file with `armed` in its name does what files beside it say, such as
`armed-segv`, from the moment on in which they appear.
"""

from pathlib import Path

_SOURCE = """
import ctypes
import itertools
import os
import time

from platforms.artifact import ArtifactFormat
from platforms.errors import InferenceError
from platforms.runtimes.ort import OrtRuntime
from platforms.runtimes.registry import RuntimeEntry

ENTRY = RuntimeEntry("wild", "acme_runtime:WildRuntime", frozenset({ArtifactFormat.ONNX}), "acme")


class WildRuntime(OrtRuntime):
    name = "wild"

    def _load(self, path, options):
        print("a library that talks on standard output")
        if "abort" in path.name:
            os.write(2, b"wild: something terrible\\n")
            os.abort()
        if "hang" in path.name:
            time.sleep(3600)
        session = super()._load(path, options)
        run_tame = session._run

        def run_wild(inputs, stop):
            do = [file.name[6:] for file in path.parent.glob("armed-*")]
            if "segv" in do:
                ctypes.string_at(0)
            if "hang" in do:
                time.sleep(3600)
            if "leak" in do:
                hoard.append(b"x" * (4 << 20))
            if "error" in do:
                raise InferenceError("wild: it was told to fail")
            return run_tame(inputs, stop)

        hoard = []
        if "armed" in path.name:
            session._run = run_wild
        if "leak" in path.name:
            run, kept = session._run, []

            def keep_all(inputs, stop):
                if len(kept) < 25_000:
                    kept.append(b"x" * (64 << 10))
                return run(inputs, stop)

            session._run = keep_all
        if "flaky" in path.name:
            run, runs = session._run, itertools.count(1)

            def fail_sometimes(inputs, stop):
                if next(runs) % 10 == 0:
                    raise InferenceError("wild: every tenth run fails")
                return run(inputs, stop)

            session._run = fail_sometimes
        return session
"""


def install_wild_runtime(site: Path) -> dict[str, str]:
    """Write the distribution into a folder; return the environment in which it is installed."""
    info = site / "acme_runtime-1.0.dist-info"
    info.mkdir(parents=True)
    (site / "acme_runtime.py").write_text(_SOURCE)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme-runtime\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[edgeward.runtimes]\nwild = acme_runtime:ENTRY\n")
    return {"PYTHONPATH": str(site)}
