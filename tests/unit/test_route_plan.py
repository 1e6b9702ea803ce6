"""Which chain of tools leads from a format to another, and what is said where none does."""

import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

from converters.compression.recipes import get_recipe
from converters.errors import NoRouteError, RecipeError
from converters.routes.plan import describe_routes, format_routes, list_routes, plan
from converters.routes.registry import TOOLS, Surroundings, ToolEntry, find_obstacle
from converters.targets import TARGETS, GraphKind, describe_targets, find_kind, plan_builds
from converters.task import ModelFormat

ROOT = Path(__file__).parents[2]
EVERYTHING = frozenset(name for tool in TOOLS for name in tool.modules)


def make_box(modules: Iterable[str] = EVERYTHING, **changes: object) -> Surroundings:
    given: dict[str, object] = {
        "system": "linux",
        "machine": "x86_64",
        "python": (3, 11),
        "has_module": frozenset(modules).__contains__,
        "get_variable": lambda name: "/opt/python",
        **changes,
    }
    return Surroundings(**given)  # type: ignore[arg-type]


def names(route: list[ToolEntry]) -> list[str]:
    return [tool.name for tool in route]


@pytest.mark.parametrize(
    ("source", "target", "route"),
    [
        (ModelFormat.CALLABLE, ModelFormat.TORCH_EXPORT, ["torch.export"]),
        (ModelFormat.CALLABLE, ModelFormat.OPENVINO, ["torch.onnx", "openvino"]),
        (ModelFormat.STATE_DICT, ModelFormat.TFLITE, ["litert-torch"]),
        (ModelFormat.TORCHSCRIPT, ModelFormat.COREML, ["coremltools"]),
        (ModelFormat.TORCH_EXPORT, ModelFormat.TENSORRT, ["torch.onnx", "tensorrt"]),
        (ModelFormat.ONNX, ModelFormat.TFLITE, ["onnx2tf"]),
        (ModelFormat.SAVED_MODEL, ModelFormat.OPENVINO, ["openvino"]),
        (ModelFormat.SAVED_MODEL, ModelFormat.TFLITE, ["tf2onnx", "onnx2tf"]),
        (ModelFormat.TFLITE, ModelFormat.OPENVINO, ["openvino"]),
        (ModelFormat.ONNX, ModelFormat.ONNX, []),
    ],
)
def test_shortest_chain_of_tools_is_planned(
    source: ModelFormat, target: ModelFormat, route: list[str]
) -> None:
    assert names(plan(source, target, here=make_box())) == route


def test_route_of_installed_tools_goes_before_a_shorter_one_of_missing_tools() -> None:
    here = make_box(EVERYTHING - {"litert_torch"})

    assert names(plan(ModelFormat.CALLABLE, ModelFormat.TFLITE, here=here)) == [
        "torch.onnx",
        "onnx2tf",
    ]


def test_route_of_missing_tools_is_planned_where_there_is_no_other() -> None:
    (tool,) = plan(ModelFormat.CALLABLE, ModelFormat.COREML, here=make_box(()))

    assert find_obstacle(tool, make_box(())) == (
        "coremltools needs torch, coremltools, not installed here: pip install 'edgeward[convert]'"
    )


@pytest.mark.parametrize(
    ("source", "target", "said"),
    [
        (ModelFormat.ONNX, ModelFormat.COREML, "no ONNX since version 6.*give a torch source"),
        (ModelFormat.TFLITE, ModelFormat.TORCH_EXPORT, "no tool makes a torch model"),
        (ModelFormat.OPENVINO, ModelFormat.ONNX, "is an end of conversion"),
        (ModelFormat.ONNX, ModelFormat.SAVED_MODEL, "what would do: saved_model"),
    ],
)
def test_pair_without_a_route_says_why_and_what_would_do(
    source: ModelFormat, target: ModelFormat, said: str
) -> None:
    with pytest.raises(NoRouteError, match=said):
        plan(source, target, here=make_box())


@pytest.mark.parametrize(
    ("tool", "changes", "said"),
    [
        ("coremltools", {"python": (3, 14)}, "needs a Python below 3.14"),
        ("coremltools", {"machine": "aarch64"}, "x86_64 and arm64 and AMD64 only, not on aarch64"),
        ("litert-torch", {"system": "win32"}, "linux and darwin only, not on win32"),
        ("litert-torch", {"modules": ()}, r"pip install 'edgeward\[convert-litert\]'"),
        ("tf2onnx", {"modules": ()}, r"pip install 'edgeward\[tf\]'"),
        (
            "onnx2tf",
            {"get_variable": lambda name: None},
            "environment of its own: python3.12 -m venv",
        ),
        ("tensorrt", {"modules": ()}, "on a box with an NVIDIA GPU: pip install tensorrt"),
    ],
)
def test_tool_that_cannot_run_says_what_to_do(
    tool: str, changes: dict[str, object], said: str
) -> None:
    entry = next(entry for entry in TOOLS if entry.name == tool)
    obstacle = find_obstacle(entry, make_box(**changes))  # type: ignore[arg-type]

    assert re.search(said, obstacle or "")


def test_every_tool_names_a_function_that_is_there() -> None:
    for tool in TOOLS:
        module, _, function = tool.entry.partition(":")
        path = ROOT / f"{module.replace('.', '/')}.py"

        assert f"\ndef {function}(task: Task) -> Facts:" in path.read_text(encoding="utf-8"), tool


def test_knowing_the_routes_loads_no_toolchain() -> None:
    code = "import converters.routes.plan, converters.routes.source, converters.routes.hop, sys; "
    code += "print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()

    assert not EVERYTHING & set(loaded)
    assert "numpy" not in loaded


def test_routes_are_told_as_rows_and_as_a_table() -> None:
    here = make_box(EVERYTHING - {"tensorrt"})
    rows = list_routes(here)
    table = format_routes(rows)

    assert len(rows) == len(ModelFormat) * (len(ModelFormat) - 1)
    assert {row["tool"] for row in describe_routes(here)} == {tool.name for tool in TOOLS}
    assert "torch.onnx → openvino" in table
    assert "needs tensorrt, not installed here" in table


def test_target_gets_the_recipe_that_pays_for_its_kind_of_graph() -> None:
    assert find_kind({"Conv": 20, "Gemm": 1}) is GraphKind.CONVOLUTION
    assert find_kind({"MatMul": 20, "Softmax": 2}) is GraphKind.PRODUCT
    assert find_kind({"Add": 1}) is None
    recipes = {
        kind: [build.recipe for build in plan_builds(["x86-vnni"], kind, has_calibration=True)]
        for kind in (GraphKind.CONVOLUTION, GraphKind.PRODUCT, None)
    }

    assert recipes[GraphKind.CONVOLUTION][:2] == ["openvino_int8", "onnx_static"]
    assert recipes[GraphKind.PRODUCT][:2] == ["openvino_int8", "onnx_dynamic"]
    assert recipes[None] == [None, None]


def test_artifact_for_several_targets_is_made_once_and_says_for_which() -> None:
    builds = plan_builds(TARGETS, GraphKind.PRODUCT, has_calibration=False)
    plain = [build for build in builds if (build.format, build.recipe) == (ModelFormat.ONNX, None)]

    assert [build.targets for build in plain] == [tuple(TARGETS)]
    assert plain[0].requires.to_json() == {}
    assert all(build.recipe != "openvino_int8" for build in builds)
    dynamic = [build for build in builds if build.recipe == "onnx_dynamic"]
    assert {build.targets: build.requires.to_json() for build in dynamic} == {
        ("rpi5", "jetson-orin"): {"arch": ["aarch64"], "cpu_flags": ["asimddp"]},
        ("x86-avx2",): {"arch": ["x86_64"], "cpu_flags": ["avx2"]},
        ("x86-vnni",): {"arch": ["x86_64"], "cpu_flags": ["avx512_vnni"]},
    }


def test_every_recipe_of_a_target_exists_and_makes_that_format() -> None:
    for target in TARGETS.values():
        for build in target.builds:
            if build.recipe is not None:
                assert get_recipe(build.recipe).target is build.format, (target.name, build.recipe)
        assert any(build.recipe is None for build in target.builds)
    assert {row["target"] for row in describe_targets()} == set(TARGETS)


def test_unknown_target_is_said_with_the_known_ones() -> None:
    with pytest.raises(RecipeError, match="no target 'rpi9'; known are rpi5, jetson-orin"):
        plan_builds(["rpi9"], None, has_calibration=False)
