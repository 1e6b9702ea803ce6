"""Proof that an inference runtime works on this box: one inference with a known answer.

Owns the child process in which each runtime is tried, because a fresh one can die
with "illegal instruction" (seen on a Raspberry Pi 4), hang, or load, run and answer
wrong. Never imports a runtime into its own process, and never raises for what a
runtime does: whatever happens becomes a finding.

    python -m platforms.runtimes.proof NAME    # the child: one JSON line on stdout
"""

import json
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from platforms.errors import PlatformError, RuntimeMissingError
from platforms.runtimes.registry import get_runtime, read_registry
from platforms.spec import RuntimeFinding, RuntimeStatus

if TYPE_CHECKING:
    from platforms.runtimes.base import Runtime

DEFAULT_TIMEOUT_S = 30.0
"""A cold import of a large runtime from an SD card takes some 10 s."""


def prove_runtimes(timeout_s: float = DEFAULT_TIMEOUT_S) -> tuple[RuntimeFinding, ...]:
    """Try every registered runtime once, each in a child process, as many at a time as cores.

    Blocks for up to `timeout_s` per runtime (about 0.3 s for onnxruntime on x86-64, 4 s of CPU
    for torch). A user's entry point that cannot be read is a finding with status `broken`.
    """
    registry = read_registry()
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        proven = list(pool.map(lambda name: prove_runtime(name, timeout_s), registry.entries))
    faulty = [
        RuntimeFinding(name, RuntimeStatus.BROKEN, detail=why)
        for name, why in registry.faults.items()
    ]
    return (*proven, *faulty)


def prove_runtime(name: str, timeout_s: float = DEFAULT_TIMEOUT_S) -> RuntimeFinding:
    """Try the runtime called `name` in a child process and say what came of it."""
    child = _start_child(name)
    try:
        output, errors = child.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        # The whole group: a grandchild that holds the pipes would keep `communicate` waiting.
        os.killpg(child.pid, signal.SIGKILL)
        child.communicate()
        detail = f"no answer within {timeout_s:g} s: it hangs, or the box is too busy"
        return RuntimeFinding(name, RuntimeStatus.BROKEN, detail=detail)
    return _read_report(name, child.returncode, output, errors)


def _start_child(name: str) -> "subprocess.Popen[str]":
    # The child finds what this process finds; -P keeps the working directory off its path.
    path = [*filter(None, sys.path), str(Path(__file__).parents[2])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path)}
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "platforms.runtimes.proof", name],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
        text=True,
        errors="replace",
        start_new_session=True,
    )


def _read_report(name: str, returncode: int, output: str, errors: str) -> RuntimeFinding:
    broken = RuntimeFinding(name, RuntimeStatus.BROKEN)
    last_words = (errors.strip().splitlines() or ["nothing on stderr"])[-1]
    if returncode < 0:
        # Real-time signals between the first and the last have no name.
        names = {known.value: known.name for known in signal.Signals}
        killer = names.get(-returncode, f"signal {-returncode}")
        return replace(broken, detail=f"died with {killer} ({last_words})")
    if returncode > 0:
        return replace(broken, detail=f"exited with {returncode} ({last_words})")
    try:
        report = json.loads(output.splitlines()[-1])
        return RuntimeFinding(
            name=name,
            status=RuntimeStatus(report["status"]),
            version=report["version"],
            providers=tuple(report["providers"]),
            detail=report["detail"],
        )
    except (IndexError, ValueError, KeyError, TypeError) as exc:
        return replace(broken, detail=f"ended without a report ({exc!r})")


def _run_child(name: str) -> dict[str, Any]:
    report: dict[str, Any] = {"status": "broken", "version": None, "providers": [], "detail": ""}
    try:
        runtime = get_runtime(name)
        report["version"] = runtime.version()
        report["providers"] = list(runtime.providers())
        if runtime.is_proof_needed:
            report["detail"] = _compare_with_answer(runtime)
    except RuntimeMissingError as exc:
        missing = isinstance(exc.__cause__, ModuleNotFoundError)
        return {**report, "status": "missing" if missing else "broken", "detail": str(exc)}
    except PlatformError as exc:
        return {**report, "detail": str(exc)}
    return {**report, "status": "broken" if report["detail"] else "proven"}


def _compare_with_answer(runtime: "Runtime") -> str:
    """Run the proof model; return what is wrong with its answer, or nothing."""
    # Imported here: whoever only asks for findings stays free of NumPy.
    import numpy as np

    from platforms.runtimes.base import PROOF_ANSWER_FILE, LoadOptions, read_proof_declaration

    answer = json.loads(PROOF_ANSWER_FILE.read_text(encoding="utf-8"))
    session = runtime.load(
        runtime.get_proof_model(), LoadOptions(threads=1), read_proof_declaration()
    )
    inputs = {k: np.asarray(v, dtype=np.float32) for k, v in answer["inputs"].items()}
    found = session.run(inputs)
    for name, right in answer["outputs"].items():
        if name not in found or np.shape(found[name]) != np.shape(right):
            return f"wrong answer: no output {name} of shape {list(np.shape(right))}"
        deviation = float(np.max(np.abs(found[name] - np.asarray(right))))
        # Written so that NaN, which compares as false, counts as wrong.
        if not deviation <= answer["tolerance"]:
            return f"wrong answer: {name} is off by {deviation:.3g}, allowed {answer['tolerance']}"
    return ""


if __name__ == "__main__":
    sys.stdout.write("\n" + json.dumps(_run_child(sys.argv[1])) + "\n")
