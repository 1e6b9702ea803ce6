import ast
import importlib.util
import stat
import subprocess
import sys
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType

import pytest

REPOSITORY = Path(__file__).parents[2]
SCRIPT = REPOSITORY / "run"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    # Without this, importing a file with no suffix leaves a `__pycache__` beside it.
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    loader = SourceFileLoader("edgeward_run", str(SCRIPT))
    spec = importlib.util.spec_from_loader(loader.name, loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def call(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, SCRIPT, *arguments], capture_output=True, text=True)


def test_the_scripts_can_be_executed() -> None:
    for path in (SCRIPT, REPOSITORY / ".ci" / "run"):
        assert path.stat().st_mode & stat.S_IXUSR, path


def test_ci_runs_the_tests_and_nothing_else() -> None:
    lines = (REPOSITORY / ".ci" / "run").read_text().splitlines()

    assert lines[0] == "#!/usr/bin/env bash"
    assert lines[-1] == 'exec ./run test "$@"'
    assert len(lines) == 3


def test_the_script_needs_the_standard_library_only() -> None:
    tree = ast.parse(SCRIPT.read_text(), feature_version=(3, 11))
    imported = {
        name.split(".")[0]
        for node in ast.walk(tree)
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }

    assert imported <= set(sys.stdlib_module_names)


@pytest.mark.parametrize("arguments", [(), ("nonsense",), ("--nonsense",)])
def test_an_unknown_command_is_answered_with_the_usage(arguments: tuple[str, ...]) -> None:
    done = call(*arguments)

    assert done.returncode == 2
    assert "./run COMMAND" in done.stderr
    assert done.stdout == ""


def test_help_shows_every_command(script: ModuleType) -> None:
    done = call("--help")

    assert done.returncode == 0
    for command in script.COMMANDS:
        assert f"\n  {command} " in done.stdout


def test_an_unknown_benchmark_is_refused() -> None:
    done = call("bench", "nonsense")

    assert done.returncode == 2
    assert "no benchmark is called nonsense" in done.stderr


def test_benchmarks_are_listed_by_name_without_the_private_ones(
    script: ModuleType, tmp_path: Path
) -> None:
    for name in ("pipeline.py", "detect.py", "_timing.py", "__init__.py", "results.json"):
        (tmp_path / name).touch()

    assert script.list_benchmarks(tmp_path) == ["detect", "pipeline"]


def test_the_fingerprint_depends_on_everything_that_is_installed(script: ModuleType) -> None:
    base = ("dev", b"[project]", "3.11.2", Path("/a"))
    changed = [
        ("demo", *base[1:]),
        (base[0], b"[project]\n", *base[2:]),
        (*base[:2], "3.12.0", base[3]),
        (*base[:3], Path("/b")),
    ]

    prints = {script.fingerprint(*parts) for parts in (base, *changed)}

    assert script.fingerprint(*base) in prints
    assert len(prints) == 1 + len(changed)


def wanted(extra: str) -> str:
    return f"now-{extra}"


@pytest.mark.parametrize(
    ("stamps", "extra", "installed"),
    [
        ({}, "dev", False),
        ({"dev": "now-dev"}, "dev", True),
        ({"dev": "now-dev"}, "demo", True),
        ({"demo": "now-demo"}, "demo", True),
        ({"demo": "now-demo"}, "dev", False),
        ({"dev": "before-dev"}, "dev", False),
        ({"dev": "before-dev", "demo": "now-demo"}, "demo", True),
    ],
)
def test_a_stamp_decides_whether_to_install_again(
    script: ModuleType, tmp_path: Path, stamps: dict[str, str], extra: str, installed: bool
) -> None:
    for name, text in stamps.items():
        script.stamp_path(tmp_path, name).write_text(text)

    assert script.is_installed(tmp_path, extra, wanted) is installed


def test_without_root_the_command_to_type_is_said(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script, "find_root_prefix", lambda: None)
    monkeypatch.setattr(script, "find_program", lambda name: f"/usr/bin/{name}")

    with pytest.raises(script.SetupError) as caught:
        script.install_system_packages(["mosquitto", "redis-server"])

    assert "sudo apt-get install -y mosquitto redis-server" in str(caught.value)


def test_a_failing_command_shows_the_end_of_its_output(
    script: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    code = "import sys; print(*range(100), sep='\\n'); sys.exit(3)"

    with pytest.raises(script.SetupError) as caught:
        script.run_quietly([sys.executable, "-c", code], "counting", "Count again.")

    lines = str(caught.value).splitlines()
    assert lines[:-1] == [str(number) for number in range(70, 100)]
    assert lines[-1].endswith("failed (3). Count again.")
    assert capsys.readouterr().out == "· counting\n"


def test_a_quiet_command_says_only_what_is_going_on(
    script: ModuleType, capfd: pytest.CaptureFixture[str]
) -> None:
    script.run_quietly([sys.executable, "-c", "print('noise')"], "working", "")

    assert capfd.readouterr().out == "· working\n"


def test_all_steps_run_and_one_failure_fails_the_whole(
    script: ModuleType, capfd: pytest.CaptureFixture[str]
) -> None:
    bad = ("lint", [sys.executable, "-c", "raise SystemExit(1)"])
    good = ("tests", [sys.executable, "-c", "print('ran')"])

    assert script.run_steps([bad, good]) == 1
    assert capfd.readouterr().out.splitlines() == ["── lint", "── tests", "ran", "── failed: lint"]
    assert script.run_steps([good]) == 0
