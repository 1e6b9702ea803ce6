"""Core ML recipes, on any system: what stands in the files. What they answer is evidence's part."""

from pathlib import Path
from typing import Any

import pytest

from converters.errors import CompressionError, RecipeError
from tests.integration.compression.conftest import Nets
from tests.integration.compression.judging import apply

# coremltools warns of newer torch and scikit-learn.
pytestmark = pytest.mark.filterwarnings("ignore")


# Measured on the encoder: .33, .27, .53.
@pytest.mark.parametrize(
    ("recipe", "size_ratio"),
    [("coreml_int8_weights", 0.4), ("coreml_palettized", 0.35), ("coreml_fp16", 0.6)],
)
def test_recipe_makes_a_smaller_package(
    nets: Nets, tmp_path: Path, recipe: str, size_ratio: float
) -> None:
    target, facts = apply(recipe, nets.get_coreml("encoder"), tmp_path)

    assert (target / "Manifest.json").exists()
    assert not facts["is_no_op"]
    assert facts["size_ratio"] < size_ratio


def test_fp16_leaves_inputs_and_outputs_as_they_are(nets: Nets, tmp_path: Path) -> None:
    import coremltools

    target, _ = apply("coreml_fp16", nets.get_coreml("encoder"), tmp_path)
    spec = coremltools.models.MLModel(str(target), skip_model_load=True).get_spec()
    edges = [*spec.description.input, *spec.description.output]

    assert [edge.type.multiArrayType.dataType for edge in edges] == [65568, 65568]


def test_weights_too_small_to_compress_are_called_a_no_op(nets: Nets, tmp_path: Path) -> None:
    options = {"min_weights": 10**7}
    _, facts = apply("coreml_int8_weights", nets.get_coreml("encoder"), tmp_path, options)

    assert facts["is_no_op"]


def test_bad_options_and_files_are_refused(nets: Nets, tmp_path: Path) -> None:
    (tmp_path / "bad.mlpackage").mkdir()
    source = nets.get_coreml("encoder")
    cases: list[tuple[str, Path, dict[str, Any], type[Exception]]] = [
        ("coreml_palettized", source, {"bits": 5}, RecipeError),
        ("coreml_int8_weights", source, {"dtype": "int4"}, RecipeError),
        ("coreml_fp16", tmp_path / "bad.mlpackage", {}, CompressionError),
    ]
    for number, (recipe, file, options, kind) in enumerate(cases):
        folder = tmp_path / str(number)
        folder.mkdir()
        with pytest.raises(kind):
            apply(recipe, file, folder, options)
