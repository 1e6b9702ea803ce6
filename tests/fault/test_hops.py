"""Whatever a converter does, its step ends with a result or an error, and nothing else changes."""

from pathlib import Path

import psutil
import pytest

from converters.errors import (
    ConversionCanceledError,
    HopFailedError,
    HopMemoryError,
    HopTimeoutError,
    InputChangedError,
    OperatorError,
    OutsideDataError,
    SourceError,
    ToolMissingError,
)
from converters.routes.hop import HopResult, Limits, run_hop
from converters.task import ModelFile, ModelFormat
from tests.harness.waiting import wait_until
from tests.harness.wild_tools import make_entry

LIMITS = Limits(time_s=100, memory_mb=2000)
TOOL = make_entry()
# Field 7 of a ModelProto, empty: the shortest ONNX file there is.
CONTENT = b"\x3a\x00"


@pytest.fixture
def source(tmp_path: Path) -> ModelFile:
    (tmp_path / "given").mkdir()
    path = tmp_path / "given" / "net.onnx"
    path.write_bytes(CONTENT)
    return ModelFile(path, ModelFormat.ONNX)


@pytest.fixture
def target(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out" / "net.tflite"


def run(source: ModelFile, target: Path, do: str, limits: Limits = LIMITS) -> HopResult:
    options = {"do": do, "original": str(source.path)}
    return run_hop(TOOL, source, target, options, limits)


def list_left(target: Path) -> list[str]:
    return sorted(path.name for path in target.parent.iterdir())


def is_running(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def test_result_and_what_belongs_to_it_are_moved_into_place(
    source: ModelFile, target: Path
) -> None:
    told: list[tuple[float, str]] = []
    found = run_hop(
        TOOL,
        source,
        target,
        {"do": "calm"},
        LIMITS,
        lambda share, doing: told.append((share, doing)),
    )

    assert target.read_bytes() == CONTENT
    assert list_left(target) == ["net.bin", "net.tflite"]
    assert found.file == ModelFile(target, ModelFormat.TFLITE)
    assert found.facts["did"] == "calm"
    assert found.facts["source"] != str(source.path)
    assert told == [(0.5, "half of it")]
    assert "to standard output" in found.log
    assert "to standard error" in found.log
    assert found.duration_s > 0
    assert found.peak_mb > 0


def test_tool_runs_at_a_low_priority_with_temporary_files_of_its_own(
    source: ModelFile, target: Path
) -> None:
    run(source, target, "tell_surroundings")
    niceness, folder = target.read_text(encoding="utf-8").split()

    assert int(niceness) >= 10
    assert Path(folder).is_relative_to(target.parent.resolve())
    assert not Path(folder).exists()


def test_tool_that_asks_a_question_gets_no_answer(source: ModelFile, target: Path) -> None:
    assert run(source, target, "read_input").facts["did"] == "read_input"


def test_converter_that_overwrites_its_input_is_refused_and_the_original_is_whole(
    source: ModelFile, target: Path
) -> None:
    with pytest.raises(InputChangedError, match="wild overwrote its input"):
        run(source, target, "overwrite")

    assert source.path.read_bytes() == CONTENT
    assert list_left(target) == []


def test_original_that_changed_meanwhile_is_said(source: ModelFile, target: Path) -> None:
    with pytest.raises(InputChangedError, match="changed while it was being converted"):
        run(source, target, "change_original")
    assert list_left(target) == []


def test_converter_that_hangs_ends_with_everything_it_started(
    source: ModelFile, target: Path
) -> None:
    told: list[str] = []
    with pytest.raises(HopTimeoutError, match="wild was ended after 3 s"):
        run_hop(
            TOOL,
            source,
            target,
            {"do": "hang"},
            Limits(time_s=3),
            lambda share, doing: told.append(doing),
        )
    # None where the machine is so slow that the tool had not begun: nothing is left then either.
    for pid in told:
        wait_until(lambda pid=pid: not is_running(int(pid)), 10, f"{pid} goes on")  # type: ignore[misc]
    assert list_left(target) == []


@pytest.mark.parametrize("do", ["eat", "eat_in_child"])
def test_converter_that_eats_memory_is_ended(source: ModelFile, target: Path, do: str) -> None:
    with pytest.raises(HopMemoryError, match="over its limit of 300 MB"):
        run(source, target, do, Limits(time_s=100, memory_mb=300))
    assert list_left(target) == []


def test_canceled_step_ends_and_leaves_nothing(source: ModelFile, target: Path) -> None:
    told: list[str] = []
    with pytest.raises(ConversionCanceledError, match="wild was canceled"):
        run_hop(
            TOOL,
            source,
            target,
            {"do": "hang"},
            LIMITS,
            lambda share, doing: told.append(doing),
            lambda: len(told) == 2,
        )
    for pid in told:
        wait_until(lambda pid=pid: not is_running(int(pid)), 10, f"{pid} goes on")  # type: ignore[misc]
    assert list_left(target) == []


@pytest.mark.parametrize(
    ("do", "said"),
    [
        ("leave_nothing", "wrote nothing: there is no net.tflite"),
        ("leave_empty", "left net.tflite empty"),
        ("leave_empty_folder", "left net.tflite empty"),
        ("leave_link", "left a link in place of a file"),
        ("exit_well", "ended with 0 and without an answer"),
        ("die", r"died with SIGKILL \(perhaps by the kernel"),
        ("crash", "died with SIGABRT: (?s:.*)internal check failed"),
        ("raise", "ended with 1 and without an answer: (?s:.*)RuntimeError: a tensor of rank 7"),
    ],
)
def test_converter_that_fails_or_leaves_nothing_is_refused(
    source: ModelFile, target: Path, do: str, said: str
) -> None:
    with pytest.raises(HopFailedError, match=said) as caught:
        run(source, target, do)

    assert f"wild: {do}" in caught.value.log or do in ("die", "exit_well", "crash")
    assert list_left(target) == []


def test_operator_that_cannot_be_converted_is_named(source: ModelFile, target: Path) -> None:
    with pytest.raises(OperatorError, match="Nosuch has no form") as caught:
        run(source, target, "refuse_operator")

    assert (caught.value.operator, caught.value.node) == ("Nosuch", "/net/4/Nosuch")


def test_log_of_a_talkative_tool_is_bounded_and_keeps_its_end(
    source: ModelFile, target: Path
) -> None:
    log = run(source, target, "talk").log

    assert len(log) < 70_000
    assert "bytes left out" in log
    assert "line 019999" in log


def test_missing_toolchain_names_the_extra(source: ModelFile, target: Path) -> None:
    tool = make_entry(modules=("json", "nosuch_toolchain"), extra="convert-litert")
    with pytest.raises(ToolMissingError, match=r"nosuch_toolchain.*edgeward\[convert-litert\]"):
        run_hop(tool, source, target)


def test_tool_is_not_given_a_format_that_it_does_not_read(source: ModelFile, target: Path) -> None:
    with pytest.raises(SourceError, match="wild does not read tflite"):
        run_hop(TOOL, ModelFile(source.path, ModelFormat.TFLITE), target)


def test_source_that_is_not_there_is_said(source: ModelFile, target: Path) -> None:
    with pytest.raises(SourceError, match="there is no model at"):
        run(ModelFile(source.path.with_name("nosuch.onnx"), ModelFormat.ONNX), target, "calm")


def test_folder_is_copied_whole(tmp_path: Path, target: Path) -> None:
    folder = tmp_path / "saved"
    (folder / "variables").mkdir(parents=True)
    (folder / "saved_model.pb").write_bytes(b"graph")
    (folder / "variables" / "weights").write_bytes(b"weights")
    tool = make_entry(entry="tests.harness.wild_tools:list_files")

    found = run_hop(tool, ModelFile(folder, ModelFormat.SAVED_MODEL), target)

    assert found.facts["files"] == ["saved_model.pb", "variables/weights"]


def test_link_out_of_a_folder_is_not_followed(tmp_path: Path, target: Path) -> None:
    folder = tmp_path / "saved"
    folder.mkdir()
    (folder / "saved_model.pb").write_bytes(b"graph")
    (folder / "passwords").symlink_to("/etc/passwd")
    with pytest.raises(OutsideDataError, match="outside its own folder"):
        run_hop(TOOL, ModelFile(folder, ModelFormat.SAVED_MODEL), target, {"do": "calm"})
