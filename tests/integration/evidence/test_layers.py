"""The nodes at which a quantized net goes wrong are found, in a process with limits."""

import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest

from converters.evidence import layers
from converters.evidence.layers import find_worst_layers
from platforms.errors import MeasuringError
from tests.integration.evidence.conftest import Nets
from tests.integration.evidence.test_proof import quantize


def test_node_that_ruins_a_quantized_net_is_told_from_those_that_pass_it_on(
    nets: Nets, tmp_path: Path
) -> None:
    original = nets.get_onnx("unbalanced")
    candidate = quantize(nets, "unbalanced", tmp_path, per_channel=False)
    found = find_worst_layers(original, candidate, nets.get_golden("unbalanced").inputs, worst=3)
    levels = [layer.sqnr_db or 0.0 for layer in found]
    assert levels == sorted(levels)
    maker = max(found, key=lambda layer: layer.lost_db)
    # The depthwise convolution comes second, with its ReLU; what it reads is all right.
    convolutions = [node for node in onnx.load(original).graph.node if node.op_type == "Conv"]
    follower = next(
        node for node in onnx.load(original).graph.node if convolutions[1].output[0] in node.input
    )
    assert maker.tensor in (convolutions[1].output[0], follower.output[0])
    assert maker.lost_db > 20


def test_equal_files_have_no_error_in_any_node(nets: Nets, tmp_path: Path) -> None:
    copy = tmp_path / "copy.onnx"
    shutil.copy(nets.get_onnx("mlp"), copy)
    found = find_worst_layers(nets.get_onnx("mlp"), copy, nets.get_golden("mlp").inputs)
    assert found
    assert {layer.max_abs for layer in found} == {0.0}


def test_tensors_are_compared_a_few_at_a_time(nets: Nets, tmp_path: Path) -> None:
    candidate = quantize(nets, "mlp", tmp_path, per_channel=True)
    inputs = {"x": nets.get_golden("mlp").inputs["x"][:16]}
    rows = len(inputs["x"])
    side = layers._Side(nets.get_onnx("mlp"), inputs)
    sizes = side.estimate_bytes(rows)
    assert sizes["y"] == 4 * rows * 10
    names = [name for name in side.nodes if name in sizes]
    groups = [*layers._group(names, dict.fromkeys(names, layers._GROUP_BYTES // 2))]
    assert [len(group) for group in groups][:2] == [2, 2]
    assert [name for group in groups for name in group] == names
    assert layers._compare_files(nets.get_onnx("mlp"), candidate, inputs)


def test_file_that_cannot_be_run_is_an_error_and_no_crash(nets: Nets, tmp_path: Path) -> None:
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"no model at all")
    with pytest.raises(MeasuringError, match=r"broken\.onnx") as caught:
        find_worst_layers(nets.get_onnx("mlp"), broken, nets.get_golden("mlp").inputs)
    assert caught.value.cause_code == "bad_source"


def test_original_that_takes_other_inputs_is_an_error(nets: Nets) -> None:
    inputs = {"z": np.zeros((4, 1, 8, 8), np.float32)}
    with pytest.raises(MeasuringError, match="cannot be run"):
        find_worst_layers(nets.get_onnx("mlp"), nets.get_onnx("mlp"), inputs)
