import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from console.children import (
    FIRST_DELAY_S,
    LONGEST_DELAY_S,
    ROTATE_OVER_BYTES,
    Children,
    ChildSpec,
    restart_delay_s,
)
from console.errors import ChildStartError
from tests.conftest import wait_until

REPOSITORY = Path(__file__).parents[2]


def python_child(name: str, code: str, ready_file: Path | None = None) -> ChildSpec:
    if ready_file is None:
        return ChildSpec(name, [sys.executable, "-c", code])
    return ChildSpec(name, [sys.executable, "-c", code], ready=ready_file.exists)


def sleeper(name: str, ready_file: Path | None = None) -> ChildSpec:
    touch = f"open({str(ready_file)!r}, 'w');" if ready_file else ""
    return python_child(name, f"import time; {touch} time.sleep(600)", ready_file)


def stubborn(name: str, ready_file: Path) -> ChildSpec:
    code = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
        f"open({str(ready_file)!r}, 'w'); time.sleep(600)"
    )
    return python_child(name, code, ready_file)


def is_alive(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


@pytest.fixture
def children(tmp_path: Path) -> Iterator[Children]:
    with Children(tmp_path / "log") as running:
        yield running


def pid_of(children: Children, name: str) -> int:
    pid = {state.name: state.pid for state in children.state()}[name]
    assert pid is not None
    return pid


def test_each_child_starts_once_the_one_before_it_is_ready(
    children: Children, tmp_path: Path
) -> None:
    first_ready = tmp_path / "first"
    seen = tmp_path / "seen"
    children.add(sleeper("first", first_ready))
    code = f"import os, time; os.path.exists({str(first_ready)!r}) and open({str(seen)!r}, 'w');"
    children.add(python_child("second", f"{code} time.sleep(600)", seen))

    children.start()

    assert [state.name for state in children.state()] == ["first", "second"]
    assert all(state.pid and state.restarts == 0 for state in children.state())


def test_a_killed_child_is_started_again_and_counted(children: Children) -> None:
    children.add(sleeper("worker"))
    children.start()
    before = children.state()[0]
    assert before.pid is not None

    os.kill(before.pid, signal.SIGKILL)

    wait_until(lambda: children.state()[0].pid not in (None, before.pid), 10, "restarted")
    after = children.state()[0]
    assert after.restarts == 1
    assert after.since_at > before.since_at


def test_other_children_live_on_when_one_dies(children: Children) -> None:
    children.add(sleeper("steady"))
    children.add(sleeper("victim"))
    children.start()
    steady, victim = pid_of(children, "steady"), pid_of(children, "victim")

    os.kill(victim, signal.SIGKILL)

    wait_until(lambda: children.state()[1].restarts == 1, 10, "the victim is restarted")
    assert pid_of(children, "steady") == steady


def test_a_child_that_is_not_ready_in_time_is_stopped_and_its_output_shown(
    children: Children,
) -> None:
    argv = [sys.executable, "-uc", "print('no such model'); import time; time.sleep(600)"]
    log = ChildSpec("worker", argv, ready=lambda: False, ready_timeout_s=2)
    children.add(log)

    with pytest.raises(ChildStartError, match="not ready within 2 s") as caught:
        children.start()

    assert "no such model" in str(caught.value)
    assert children.state()[0].pid is None


def test_a_child_that_ends_before_it_is_ready_stops_those_before_it(
    children: Children,
) -> None:
    children.add(sleeper("first"))
    children.add(ChildSpec("broken", ["/nonexistent/program"], ready=lambda: False))

    with pytest.raises(ChildStartError, match="cannot run /nonexistent/program"):
        children.start()

    assert [state.pid for state in children.state()] == [None, None]


def test_one_child_can_be_stopped_and_started_while_others_run(children: Children) -> None:
    children.add(sleeper("mqtt"))
    children.add(sleeper("agent"))
    children.start()
    agent, mqtt = pid_of(children, "agent"), pid_of(children, "mqtt")

    children.stop_child("mqtt")
    assert not is_alive(mqtt)
    assert [state.pid for state in children.state()] == [None, agent]

    children.start_child("mqtt")
    assert pid_of(children, "mqtt") != mqtt
    assert children.state()[0].restarts == 0


def test_restart_replaces_the_process(children: Children) -> None:
    children.add(sleeper("worker"))
    children.start()
    before = pid_of(children, "worker")

    children.restart("worker")

    assert pid_of(children, "worker") != before
    assert not is_alive(before)


def test_starting_a_running_child_changes_nothing(children: Children) -> None:
    children.add(sleeper("worker"))
    children.start()
    before = pid_of(children, "worker")

    children.start_child("worker")

    assert pid_of(children, "worker") == before


def test_a_stop_ends_a_start_that_waits_for_readiness(children: Children) -> None:
    argv = [sys.executable, "-c", "import time; time.sleep(600)"]
    children.add(ChildSpec("worker", argv, ready=lambda: False, ready_timeout_s=60))
    caught: list[ChildStartError] = []

    def start() -> None:
        try:
            children.start()
        except ChildStartError as exc:
            caught.append(exc)

    starting = threading.Thread(target=start)
    starting.start()
    wait_until(lambda: children.state()[0].pid, 10, "the child is up")
    children.stop()
    starting.join(timeout=30)

    assert not starting.is_alive()
    assert "was stopped before it was ready" in str(caught[0])


def test_a_child_that_ignores_sigterm_is_killed_after_the_grace(
    children: Children, tmp_path: Path
) -> None:
    children.add(stubborn("worker", tmp_path / "ready"))
    children.start()
    pid = pid_of(children, "worker")

    children.stop_child("worker", grace_s=0.2)

    assert not is_alive(pid)


def test_what_a_child_left_behind_is_killed_with_it(children: Children, tmp_path: Path) -> None:
    note = tmp_path / "grandchild"
    code = (
        "import pathlib, subprocess, sys, time;"
        "p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']);"
        f"draft = pathlib.Path({str(note) + '.tmp'!r}); draft.write_text(str(p.pid));"
        f"draft.rename({str(note)!r}); time.sleep(600)"
    )
    children.add(python_child("worker", code, note))
    children.start()
    grandchild = int(note.read_text())
    assert is_alive(grandchild)

    children.stop()

    wait_until(lambda: not is_alive(grandchild), 10, "the grandchild is gone")


def test_children_stop_in_reverse_order(children: Children, tmp_path: Path) -> None:
    journal = tmp_path / "journal"
    for name in ("queue", "mqtt", "agent"):
        ready = tmp_path / f"{name}.ready"
        code = (
            "import signal, sys, time\n"
            "def end(*_):\n"
            f"    with open({str(journal)!r}, 'a') as f: f.write('{name} ')\n"
            "    sys.exit(0)\n"
            "signal.signal(signal.SIGTERM, end)\n"
            f"open({str(ready)!r}, 'w')\n"
            "time.sleep(600)\n"
        )
        children.add(python_child(name, code, ready))
    children.start()

    children.stop()

    assert journal.read_text().split() == ["agent", "mqtt", "queue"]


def test_output_goes_to_a_log_of_the_childs_name_which_is_rotated_when_large(
    children: Children, tmp_path: Path
) -> None:
    log = tmp_path / "log" / "worker.log"
    log.parent.mkdir()
    with log.open("wb") as grown:
        grown.truncate(ROTATE_OVER_BYTES + 1)
    code = "import sys, time; print('to stdout', flush=True); sys.stderr.write('to stderr\\n');"
    children.add(python_child("worker", f"{code} time.sleep(600)"))

    children.start()

    wait_until(lambda: "to stderr" in log.read_text(), 10, "the output is logged")
    assert log.read_text().splitlines() == ["to stdout", "to stderr"]
    assert log.with_name("worker.log.1").stat().st_size == ROTATE_OVER_BYTES + 1


def test_the_environment_is_added_to_the_supervisors_own(
    children: Children, tmp_path: Path
) -> None:
    note = tmp_path / "note"
    code = f"import os, time; open({str(note)!r}, 'w').write(os.environ['LANE']); time.sleep(600)"
    children.add(
        ChildSpec(
            "worker",
            [sys.executable, "-c", code],
            env={"LANE": "inference"},
            ready=lambda: note.exists() and note.read_text() == "inference",
        )
    )

    children.start()


def test_a_child_leads_a_session_of_its_own(children: Children) -> None:
    children.add(sleeper("worker"))
    children.start()
    pid = pid_of(children, "worker")

    assert os.getsid(pid) == pid


def test_a_second_child_of_the_same_name_is_refused(children: Children) -> None:
    children.add(sleeper("worker"))

    with pytest.raises(ValueError, match="worker exists already"):
        children.add(sleeper("worker"))


@pytest.mark.parametrize(
    ("quick_ends", "delay_s"),
    [(1, 0.2), (2, 0.4), (3, 0.8), (4, 1.6), (5, 3.2), (6, 6.4), (7, 10.0), (100_000, 10.0)],
)
def test_restarts_back_off_up_to_a_limit(quick_ends: int, delay_s: float) -> None:
    assert restart_delay_s(quick_ends) == pytest.approx(delay_s)
    assert FIRST_DELAY_S <= restart_delay_s(quick_ends) <= LONGEST_DELAY_S


SUPERVISOR = """
import sys
from pathlib import Path
from console.children import Children, ChildSpec

folder = Path(sys.argv[1])
children = Children(folder / "log")
for name in ("first", "second"):
    ready = folder / name
    code = f"import os, time; open({str(ready)!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    children.add(
        ChildSpec(
            name,
            [sys.executable, "-c", code],
            ready=lambda ready=ready: ready.exists() and bool(ready.read_text()),
        )
    )
children.start()
(folder / "up").touch()
children.run_until_stopped()
(folder / "stopped").touch()
"""


@pytest.fixture
def supervisor(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(
        [sys.executable, "-c", SUPERVISOR, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )
    wait_until((tmp_path / "up").exists, 30, "the supervisor has started its children")
    yield process
    process.kill()
    process.wait()


@pytest.mark.skipif(sys.platform != "linux", reason="the parent-death signal is Linux's own")
def test_no_child_outlives_a_supervisor_that_was_killed(
    supervisor: subprocess.Popen[bytes], tmp_path: Path
) -> None:
    pids = [int((tmp_path / name).read_text()) for name in ("first", "second")]
    assert all(is_alive(pid) for pid in pids)

    supervisor.kill()
    supervisor.wait()

    wait_until(lambda: not any(map(is_alive, pids)), 10, "the children are gone")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_signal_stops_the_children_and_the_supervisor_ends_cleanly(
    supervisor: subprocess.Popen[bytes], tmp_path: Path, number: signal.Signals
) -> None:
    pids = [int((tmp_path / name).read_text()) for name in ("first", "second")]

    supervisor.send_signal(number)

    assert supervisor.wait(timeout=30) == 0
    assert (tmp_path / "stopped").exists()
    assert not any(map(is_alive, pids))
