"""The measuring child is as light as its memory figures need it to be."""

from tests.architecture.test_imports import import_fresh


def test_measuring_child_loads_neither_the_command_line_nor_a_runtime() -> None:
    loaded = import_fresh("platforms.measuring.child")

    assert "numpy" in loaded, "the probe sees nothing"
    assert loaded & {"agent", "onnxruntime", "pydantic", "rich", "typer", "worker"} == set()


def test_command_is_registered_without_anything_that_measures() -> None:
    loaded = import_fresh("console.commands.bench")

    assert loaded & {"matplotlib", "numpy", "onnxruntime"} == set()
