"""Serving over HTTP beside other servers: the same ONNX files, one after another, in one run.

Edgeward's worker, real Triton (python backend with onnxruntime, from the nvidia-pytriton
wheel), PyTriton, MLServer and LitServe, each in a virtual environment of its own below
`--environments` (made at the first run: it downloads about 2 GB), each with sessions of one
thread and two workers or instances where it has such a thing, under load by wrk: an MLP of
three layers and a CNN of MobileNetV2's shape, both made here. Triton's protocol carries
binary tensors where a server knows them (Edgeward, Triton, PyTriton); MLServer gets its numbers as
JSON, LitServe as base64.

Reports, for each server: time from its start until both models have answered (of the first
round, and the median), resident memory of all its processes and CPU while idle; and for each
model and concurrency: requests a second and their p50 and p99. Rounds are interleaved; medians
count. Ratios are what counts: absolute figures belong to one machine.
"""

import argparse
import base64
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from rich.console import Console
from rich.table import Table

from agent.platformfile import PLATFORM_FILE, load_platform
from benchmarks.nets import write_cnn_version, write_mlp_version
from console.embedded import find_free_port, prepare_queue_broker

MODELS = ("mlp", "cnn")
CONCURRENCIES = (1, 8, 32)
_SHAPES = {"mlp": (1, 64), "cnn": (1, 3, 160, 160)}
_PEERS = Path(__file__).with_name("peers")
_START_S = 90.0
_HEADER = "Inference-Header-Content-Length"
_LUA = """
local file = io.open("{body}", "rb")
wrk.method = "POST"
wrk.body = file:read("*all")
file:close()
wrk.headers["Content-Type"] = "{content_type}"
{header}
done = function(summary, latency, requests)
  io.stderr:write(string.format(
    '{{"requests": %d, "us": %d, "p50": %d, "p99": %d, "bad": %d, "broken": %d}}\\n',
    summary.requests, summary.duration, latency:percentile(50), latency:percentile(99),
    summary.errors.status,
    summary.errors.connect + summary.errors.read + summary.errors.write + summary.errors.timeout))
end
"""


@dataclass(frozen=True)
class Body:
    """What is posted to a model."""

    path: str
    data: bytes
    content_type: str = "application/json"
    header_bytes: int | None = None
    """Length of the JSON part, where tensors follow it."""


@dataclass(frozen=True)
class Server:
    """One server under test.

    Attributes:
        packages: what pip installs for it; none: this environment.
        argv: the command, of its interpreter, the folder with the models and the port.
        body: what to post for a model.
        prepare: lays out its folder before it starts.
    """

    name: str
    packages: tuple[str, ...]
    argv: Callable[[str, Path, int], Sequence[str]]
    body: Callable[[str], Body]
    prepare: Callable[[Path, Path, int], None] = lambda _folder, _models, _port: None


def build_body(model: str, *, is_binary: bool) -> Body:
    """Return a request of the Open Inference Protocol."""
    x = np.random.default_rng(3).standard_normal(_SHAPES[model]).astype(np.float32)
    tensor: dict[str, Any] = {"name": "x", "shape": list(x.shape), "datatype": "FP32"}
    document: dict[str, Any] = {"inputs": [tensor]}
    path = f"/v2/models/{model}/infer"
    if not is_binary:
        tensor["data"] = x.ravel().tolist()
        return Body(path, json.dumps(document).encode())
    tensor["parameters"] = {"binary_data_size": x.nbytes}
    document["parameters"] = {"binary_data_output": True}
    head = json.dumps(document).encode()
    return Body(path, head + x.tobytes(), "application/octet-stream", len(head))


def _build_lit_body(model: str) -> Body:
    x = np.random.default_rng(3).standard_normal(_SHAPES[model]).astype(np.float32)
    # As many numbers as text would measure its JSON parser and nothing else.
    document = {"shape": list(x.shape), "b64": base64.b64encode(x.tobytes()).decode()}
    return Body(f"/{model}", json.dumps(document).encode())


def _prepare_triton(folder: Path, models: Path, _port: int) -> None:
    for name in MODELS:
        version = folder / "models" / name / "1"
        version.mkdir(parents=True)
        shutil.copy(models / name / "model.onnx", version)
        shutil.copy(_PEERS / "triton_model.py", version / "model.py")
        shape = ", ".join(str(axis) for axis in _SHAPES[name][1:])
        out = 10 if name == "mlp" else 1000
        (version.parent / "config.pbtxt").write_text(
            f'name: "{name}"\nbackend: "python"\nmax_batch_size: 32\n'
            f'input [{{ name: "x" data_type: TYPE_FP32 dims: [{shape}] }}]\n'
            f'output [{{ name: "y" data_type: TYPE_FP32 dims: [{out}] }}]\n'
            "instance_group [{ count: 2 kind: KIND_CPU }]\ndynamic_batching { }\n"
        )


def run_triton(python: str, folder: Path, port: int) -> Sequence[str]:
    """Return the command of the Triton in an environment, for models in `folder`."""
    code = "import pytriton, pathlib; print(pathlib.Path(pytriton.__file__).parent)"
    found = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
    home = Path(found.stdout.strip()) / "tritonserver"
    _lay_backend(home, folder / "backends" / "python")
    libraries = home.parents[1] / "nvidia_pytriton.libs"
    return (
        "env",
        f"LD_LIBRARY_PATH={libraries}",
        f"PATH={Path(python).parent}{os.pathsep}{os.environ['PATH']}",
        f"PYTHONPATH={_find_site(python)}",
        str(home / "bin" / "tritonserver"),
        f"--model-repository={folder / 'models'}",
        f"--backend-directory={folder / 'backends'}",
        f"--http-port={port}",
        "--http-address=127.0.0.1",
        "--allow-grpc=false",
        "--allow-metrics=false",
        "--log-info=false",
    )


def _lay_backend(home: Path, folder: Path) -> None:
    """Put the python backend together with the stub of the interpreter's version."""
    shutil.copytree(home / "backends" / "python", folder)
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    stub = home / "python_backend_stubs" / version / "triton_python_backend_stub"
    shutil.copy(stub, folder)


def _find_site(python: str) -> str:
    code = "import sysconfig; print(sysconfig.get_paths()['purelib'])"
    return subprocess.run(
        [python, "-c", code], capture_output=True, text=True, check=True
    ).stdout.strip()


def _prepare_mlserver(folder: Path, models: Path, port: int) -> None:
    shutil.copy(_PEERS / "mlserver_runtime.py", folder)
    settings = {
        "host": "127.0.0.1",
        "http_port": port,
        "grpc_port": find_free_port(),
        "metrics_port": find_free_port(),
        "parallel_workers": 2,
        "debug": False,
    }
    (folder / "settings.json").write_text(json.dumps(settings))
    for name in MODELS:
        model = {
            "name": name,
            "implementation": "mlserver_runtime.OnnxModel",
            "parameters": {"uri": str(models / name / "model.onnx")},
        }
        (folder / name).mkdir()
        (folder / name / "model-settings.json").write_text(json.dumps(model))


def _run_script(script: str) -> Callable[[str, Path, int], Sequence[str]]:
    def build(python: str, folder: Path, port: int) -> Sequence[str]:
        models = [f"{name}={folder.parent / 'models' / name / 'model.onnx'}" for name in MODELS]
        return (python, str(_PEERS / script), str(port), *models)

    return build


def _prepare_edgeward(folder: Path, models: Path, _port: int) -> None:
    """Lay out a box whose agent has run before, and whose models have been measured once.

    Both are done once on a box; the first round has neither the measured costs nor the cache of
    optimized models yet, and is reported as `first_start_s`.
    """
    box = models.parent / "box"
    load_platform(box)
    (box / "cache").mkdir(exist_ok=True)
    shutil.copy(box / PLATFORM_FILE, folder)
    (folder / "cache").symlink_to(box / "cache")
    for name in MODELS:
        version = folder / "models" / name / "1"
        shutil.copytree(models / name, version)
        (version.parent / "current").symlink_to("1")


def _run_edgeward(python: str, folder: Path, port: int) -> Sequence[str]:
    return (
        "env",
        f"EDGEWARD_DATA_DIR={folder}",
        f"EDGEWARD_HTTP__PORT={port}",
        "EDGEWARD_LOG_LEVEL=warning",
        f"EDGEWARD_QUEUE__URL=redis+socket://{folder.parent}/queue/queue.sock",
        python,
        "-m",
        "console.entry",
        "worker",
        "--lane",
        "inference",
    )


_ORT = "onnxruntime==1.32.0"
SERVERS = (
    Server(
        "edgeward",
        (),
        _run_edgeward,
        lambda model: build_body(model, is_binary=True),
        _prepare_edgeward,
    ),
    Server(
        "triton",
        ("nvidia-pytriton", _ORT),
        run_triton,
        lambda model: build_body(model, is_binary=True),
        _prepare_triton,
    ),
    Server(
        "pytriton",
        ("nvidia-pytriton", _ORT),
        _run_script("pytriton_app.py"),
        lambda model: build_body(model, is_binary=True),
    ),
    Server(
        "mlserver",
        # Newer uvloops have no event loop in the main thread, which MLServer's workers ask for.
        ("mlserver==1.7.1", "uvloop<0.22", _ORT),
        lambda python, folder, _port: (
            str(Path(python).with_name("mlserver")),
            "start",
            str(folder),
        ),
        lambda model: build_body(model, is_binary=False),
        _prepare_mlserver,
    ),
    Server(
        "litserve",
        ("litserve==0.2.19", _ORT),
        _run_script("litserve_app.py"),
        _build_lit_body,
    ),
)


def _find_base() -> str:
    """Return the interpreter of the environments; Triton loads the system's library of it."""
    system = Path("/usr/bin/python3")
    return str(system) if system.exists() else sys.executable


def find_python(server: Server, environments: Path, out: Console) -> str:
    """Return a server's interpreter; makes its environment where there is none."""
    if not server.packages:
        return sys.executable
    folder = environments / server.packages[0].partition("=")[0]
    python = folder / "bin" / "python"
    if not (folder / "ready").exists():
        out.print(f"installing {', '.join(server.packages)}")
        subprocess.run([_find_base(), "-m", "venv", "--clear", folder], check=True)
        subprocess.run([python, "-m", "pip", "install", "-q", *server.packages], check=True)
        (folder / "ready").touch()
    return str(python)


@contextmanager
def run_server(
    server: Server, python: str, folder: Path, models: Path
) -> Iterator[tuple[psutil.Process, int, float]]:
    """Run a server; gives its process, port, and the seconds until both models answered."""
    port = find_free_port()
    folder.mkdir()
    server.prepare(folder, models, port)
    with (folder / "log").open("wb") as log:
        began = time.monotonic()
        process = subprocess.Popen(
            server.argv(python, folder, port),
            cwd=folder,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            for model in MODELS:
                _wait_answer(process, f"http://127.0.0.1:{port}", server.body(model), folder)
            yield psutil.Process(process.pid), port, time.monotonic() - began
        finally:
            _end(process)


def _wait_answer(process: subprocess.Popen[bytes], base: str, body: Body, folder: Path) -> None:
    request = urllib.request.Request(base + body.path, body.data)
    request.add_header("Content-Type", body.content_type)
    if body.header_bytes is not None:
        request.add_header(_HEADER, str(body.header_bytes))
    deadline = time.monotonic() + _START_S
    while True:
        with suppress(OSError, urllib.error.URLError), urllib.request.urlopen(request, timeout=5):
            return
        if process.poll() is not None or time.monotonic() > deadline:
            text = (folder / "log").read_text(errors="replace")[-3000:]
            msg = f"it does not answer on {body.path}:\n{text}"
            raise RuntimeError(msg)
        time.sleep(0.02)


def _end(process: subprocess.Popen[bytes]) -> None:
    family = [psutil.Process(process.pid)] if process.poll() is None else []
    for member in list(family):
        family += member.children(recursive=True)
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(10)
    for member in family:
        with suppress(psutil.NoSuchProcess):
            member.kill()
    process.wait()


def measure_idle(process: psutil.Process, seconds: float) -> dict[str, float]:
    """Return memory and CPU of a process and all its children while nobody asks."""
    family = [process, *process.children(recursive=True)]
    for member in family:
        member.cpu_percent()
    time.sleep(seconds)
    return {
        "idle_rss_mb": round(sum(member.memory_info().rss for member in family) / 1e6, 1),
        "idle_cpu_percent": round(sum(member.cpu_percent() for member in family), 2),
    }


def measure_load(
    folder: Path, base: str, body: Body, concurrency: int, seconds: float
) -> dict[str, float]:
    """Post one body again and again by wrk."""
    (folder / "body").write_bytes(body.data)
    header = "" if body.header_bytes is None else f'wrk.headers["{_HEADER}"] = {body.header_bytes}'
    script = folder / "post.lua"
    script.write_text(
        _LUA.format(body=folder / "body", content_type=body.content_type, header=header)
    )
    argv = ["wrk", "-t1", f"-c{concurrency}", f"-d{seconds:g}s", "--timeout", "30s"]
    done = subprocess.run(
        [*argv, "-s", str(script), base + body.path], capture_output=True, text=True, check=True
    )
    found = json.loads(done.stderr.strip().splitlines()[-1])
    if found["bad"] or found["broken"]:
        msg = f"{found['bad']} answers were errors, {found['broken']} connections broke"
        raise RuntimeError(msg)
    return {
        "requests_per_s": found["requests"] / found["us"] * 1e6,
        "p50_ms": found["p50"] / 1000,
        "p99_ms": found["p99"] / 1000,
    }


def run_round(
    server: Server, python: str, folder: Path, models: Path, args: argparse.Namespace
) -> dict[str, Any]:
    """Start a server, leave it alone, load it, and stop it."""
    with run_server(server, python, folder, models) as (process, port, cold_s):
        figures: dict[str, Any] = {"cold_start_s": cold_s, **measure_idle(process, args.idle_s)}
        for model in MODELS:
            body = server.body(model)
            base = f"http://127.0.0.1:{port}"
            measure_load(folder, base, body, 8, 1.0)
            for concurrency in CONCURRENCIES:
                figures[f"{model}/{concurrency}"] = measure_load(
                    folder, base, body, concurrency, args.seconds
                )
    return figures


def summarise(rounds: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Return one object per server, and one per server, model and concurrency: medians."""
    report: list[dict[str, Any]] = []
    for server, runs in rounds.items():
        keys = ("cold_start_s", "idle_rss_mb", "idle_cpu_percent")
        report.append(
            {
                "server": server,
                "first_start_s": round(runs[0]["cold_start_s"], 2),
                **{key: round(statistics.median(run[key] for run in runs), 2) for key in keys},
            }
        )
        for model in MODELS:
            for concurrency in CONCURRENCIES:
                found = [run[f"{model}/{concurrency}"] for run in runs]
                figures = {
                    key: round(statistics.median(item[key] for item in found), 3)
                    for key in ("requests_per_s", "p50_ms", "p99_ms")
                }
                report.append(
                    {"server": server, "model": model, "concurrency": concurrency, **figures}
                )
    return report


def print_report(report: Sequence[dict[str, Any]], out: Console) -> None:
    """Show the figures side by side."""
    table = Table(title="requests/s (p99 ms)")
    for column in ("server", "cold s", "RSS MB", "idle %"):
        table.add_column(column)
    for model in MODELS:
        for concurrency in CONCURRENCIES:
            table.add_column(f"{model} c={concurrency}", justify="right")
    for head in (item for item in report if "model" not in item):
        cells = [head["server"]]
        cells += [f"{head[key]:g}" for key in ("cold_start_s", "idle_rss_mb", "idle_cpu_percent")]
        cells += [
            f"{item['requests_per_s']:,.0f} ({item['p99_ms']:.1f})"
            for item in report
            if "model" in item and item["server"] == head["server"]
        ]
        table.add_row(*cells)
    out.print(table)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    names = [server.name for server in SERVERS]
    parser.add_argument("--server", action="append", choices=names, help="only these")
    parser.add_argument("--seconds", type=float, default=5.0, help="of each load")
    parser.add_argument("--idle-s", type=float, default=5.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--environments",
        type=Path,
        default=Path.home() / ".cache" / "edgeward-bench",
        help="where the other servers are installed",
    )
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(argv)
    out = Console(stderr=True)
    if shutil.which("wrk") is None:
        out.print("wrk is not installed: apt-get install wrk")
        return 2
    chosen = [server for server in SERVERS if server.name in (args.server or names)]
    pythons = {server.name: find_python(server, args.environments, out) for server in chosen}
    rounds: dict[str, list[dict[str, Any]]] = {server.name: [] for server in chosen}
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        write_mlp_version(root / "models" / "mlp")
        write_cnn_version(root / "models" / "cnn")
        queue = prepare_queue_broker(root / "queue")
        broker = subprocess.Popen(queue.argv, stdout=subprocess.DEVNULL)
        try:
            for number in range(1, args.rounds + 1):
                for server in chosen:
                    out.print(f"round {number} of {args.rounds}: {server.name}")
                    folder = root / f"{server.name}-{number}"
                    rounds[server.name].append(
                        run_round(server, pythons[server.name], folder, root / "models", args)
                    )
        finally:
            broker.terminate()
            broker.wait()
    report = summarise(rounds)
    if args.json:
        print(json.dumps(report, indent=1))
    else:
        print_report(report, Console())
    return 0


if __name__ == "__main__":
    sys.exit(main())
