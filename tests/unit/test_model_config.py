"""Triton's model configuration: read, refused, completed, and told as a real Triton tells it."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from agent.manifest import Serving, parse_manifest
from platforms.artifact import ArtifactFormat, Datatype, TensorSpec
from worker.engine.modelconfig.completion import (
    DEFAULT_MAX_ROWS,
    Graph,
    apply_defaults,
    complete,
)
from worker.engine.modelconfig.document import to_json
from worker.engine.modelconfig.serving import (
    QueuePolicy,
    ServingConfig,
    TimeoutAction,
    VersionChoice,
    WarmupSource,
    apply_manifest,
    from_config,
    write_serving,
)
from worker.engine.modelconfig.source import build_serving, find_config
from worker.engine.modelconfig.support import verify_supported
from worker.engine.modelconfig.text import format_config, parse_config
from worker.errors import ModelConfigError, UnsupportedConfigError

RECORDED = Path(__file__).parents[1] / "data" / "triton_config"
NAMES = sorted(path.stem for path in RECORDED.glob("*.pbtxt"))

FREE = Graph(
    "net",
    ArtifactFormat.ONNX,
    "net.onnx",
    (TensorSpec("x", Datatype.FP32, (-1, 64)),),
    (TensorSpec("y", Datatype.FP32, (-1, 10)),),
    is_batchable=True,
)
FIXED = Graph(
    "net",
    ArtifactFormat.ONNX,
    "net.onnx",
    (TensorSpec("x", Datatype.INT64, (2, 3)),),
    (TensorSpec("y", Datatype.BYTES, (2,)),),
    is_batchable=False,
)
MANIFEST: dict[str, Any] = {
    "schema": "edgeward.manifest/v1",
    "name": "net",
    "version": "1",
    "inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, 64]}],
    "outputs": [{"name": "y", "datatype": "FP32", "shape": [-1, 10]}],
    "artifacts": [
        {
            "file": "net.onnx",
            "format": "onnx",
            "precision": "fp32",
            "sha256": "0" * 64,
            "size_bytes": 1,
        }
    ],
}


def complete_text(text: str, graph: Graph = FREE, **options: Any) -> dict[str, Any]:
    config = parse_config(text)
    return to_json(complete(config, graph, from_config(config), **options))


@pytest.mark.parametrize("name", NAMES)
def test_the_document_is_the_one_of_a_real_triton(name: str) -> None:
    config = parse_config((RECORDED / f"{name}.pbtxt").read_text())
    message = config.message
    message.default_model_filename = "model.py"
    write_serving(message, from_config(config))
    apply_defaults(message)
    recorded = json.loads((RECORDED / f"{name}.json").read_text())
    document = json.loads(json.dumps(to_json(message)))
    assert document == recorded


def test_an_unknown_field_is_an_error_that_names_its_line() -> None:
    with pytest.raises(ModelConfigError, match=r"net/config\.pbtxt.*line 3.*max_batch"):
        parse_config('name: "net"\n\nmax_batch: 4\n', "net/config.pbtxt")


def test_bytes_that_are_no_text_are_an_error() -> None:
    with pytest.raises(ModelConfigError, match="no model configuration"):
        parse_config(b"\xff\xfe")


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("ensemble_scheduling {}", "ensemble_scheduling"),
        ("sequence_batching {}", "sequence_batching"),
        ("model_transaction_policy { decoupled: true }", "decoupled"),
        ('model_operations { op_library_filename: "a.so" }', "op_library_filename"),
        ('model_repository_agents { agents { name: "a" } }', "model_repository_agents"),
        ('batch_input { kind: BATCH_ELEMENT_COUNT target_name: "n" }', "batch_input"),
        ('batch_output { target_name: "n" }', "batch_output"),
        ('cc_model_filenames { key: "7.5" value: "f" }', "cc_model_filenames"),
        ("optimization { execution_accelerators {} }", "execution_accelerators"),
        ('input { name: "x" allow_ragged_batch: true }', "allow_ragged_batch"),
        ('input { name: "x" optional: true }', "optional"),
        ('input { name: "x" is_shape_tensor: true }', "is_shape_tensor"),
        ('input { name: "x" is_non_linear_format_io: true }', "is_non_linear_format_io"),
        ('output { name: "y" reshape { shape: [1] } }', "reshape"),
        ('backend: "python"', "backend 'python'"),
        ('backend: "tensorrt"', "backend 'tensorrt'"),
        ('platform: "tensorrt_plan"', "platform 'tensorrt_plan'"),
        ("instance_group { kind: KIND_GPU }", "KIND_GPU"),
        ("instance_group { gpus: [0] }", "KIND_GPU"),
        ("instance_group { passive: true }", "passive"),
        ("instance_group { rate_limiter { priority: 1 } }", "rate_limiter"),
    ],
)
def test_what_is_not_offered_is_refused_by_its_name(text: str, named: str) -> None:
    with pytest.raises(UnsupportedConfigError, match=named) as caught:
        verify_supported(parse_config(text))
    assert caught.value.code == "unsupported_config"


@pytest.mark.parametrize("kind", ["KIND_AUTO", "KIND_CPU", "KIND_MODEL"])
def test_other_kinds_of_instances_are_taken_without_a_gpu(kind: str) -> None:
    verify_supported(parse_config(f"instance_group {{ kind: {kind} }}"))


def test_a_gpu_instance_is_taken_where_there_is_a_gpu() -> None:
    config = parse_config("instance_group { kind: KIND_GPU } instance_group { count: 2 }")
    verify_supported(config, has_gpu=True)
    groups = to_json(complete(config, FREE, from_config(config), has_gpu=True))["instance_group"]
    assert [group["kind"] for group in groups] == ["KIND_GPU", "KIND_GPU"]


def test_a_model_without_a_config_is_completed_from_its_graph() -> None:
    document = to_json(complete(None, FREE, ServingConfig()))
    assert document["name"] == "net"
    assert document["platform"] == "onnxruntime_onnx"
    assert document["backend"] == "onnxruntime"
    assert document["max_batch_size"] == DEFAULT_MAX_ROWS
    assert document["dynamic_batching"]["preferred_batch_size"] == [DEFAULT_MAX_ROWS]
    assert document["default_model_filename"] == "net.onnx"
    assert [(item["name"], item["data_type"], item["dims"]) for item in document["input"]] == [
        ("x", "TYPE_FP32", [64])
    ]
    assert document["output"][0]["dims"] == [10]
    assert document["version_policy"] == {"latest": {"num_versions": 1}}


def test_a_graph_without_a_batch_axis_keeps_its_whole_shape() -> None:
    document = to_json(complete(None, FIXED, ServingConfig()))
    assert document["max_batch_size"] == 0
    assert "dynamic_batching" not in document
    assert document["input"][0]["dims"] == [2, 3]
    assert document["output"][0]["data_type"] == "TYPE_STRING"


@pytest.mark.parametrize(
    ("text", "is_batching"),
    [
        ("max_batch_size: 8", True),
        ('max_batch_size: 8 input { name: "x" }', True),
        ("max_batch_size: 1", False),
        ("max_batch_size: 0", False),
    ],
)
def test_a_file_that_does_not_name_its_tensors_gets_dynamic_batching(
    text: str, is_batching: bool
) -> None:
    assert from_config(parse_config(text)).is_batching is is_batching


def test_a_whole_file_without_dynamic_batching_stacks_nothing() -> None:
    text = 'max_batch_size: 8 input { name: "x" } output { name: "y" }'
    assert not from_config(parse_config(text)).is_batching
    assert "dynamic_batching" not in complete_text(text)


def test_an_explicit_zero_means_no_batches_where_silence_does_not() -> None:
    assert complete_text("# max_batch_size: 0\n")["max_batch_size"] == DEFAULT_MAX_ROWS
    assert complete_text("max_batch_size: 0\n")["max_batch_size"] == 0
    assert complete_text('name: "n#" max_batch_size: 0 # so')["max_batch_size"] == 0
    hidden = r'metric_tags { key: "a" value: "\"max_batch_size: 0" }'
    assert complete_text(hidden)["max_batch_size"] == DEFAULT_MAX_ROWS
    assert complete_text('input { name: "x" dims: [-1, 64] }')["max_batch_size"] == 0
    assert complete_text('input { name: "x" dims: [64] }')["max_batch_size"] == DEFAULT_MAX_ROWS


@pytest.mark.parametrize(
    ("text", "graph", "complaint"),
    [
        ('input { name: "z" }', FREE, "input 'z' is not one of the model's: x"),
        ('output { name: "y" } output { name: "y" }', FREE, "output 'y' is not one"),
        ('input { name: "x" data_type: TYPE_FP16 }', FREE, "is FP16, in the model FP32"),
        (
            'max_batch_size: 4 input { name: "x" dims: [32] }',
            FREE,
            r"dims \[32\], the model \[64\]",
        ),
        ('max_batch_size: 4 input { name: "x" dims: [-1, 64] }', FREE, "after the batch axis"),
        ('max_batch_size: 0 input { name: "x" dims: [64] }', FREE, "max_batch_size is 0"),
        ("max_batch_size: 4", FIXED, "only a free first axis can be a batch"),
    ],
)
def test_a_config_that_contradicts_its_graph_is_an_error(
    text: str, graph: Graph, complaint: str
) -> None:
    with pytest.raises(ModelConfigError, match=complaint):
        complete_text(text, graph)


def test_a_config_may_narrow_a_free_axis() -> None:
    document = complete_text('max_batch_size: 0 input { name: "x" dims: [1, 64] }')
    assert document["input"][0]["dims"] == [1, 64]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("max_batch_size: 4 dynamic_batching { preferred_batch_size: [8] }", "preferred"),
        ("max_batch_size: -1", "no number of rows"),
        ("dynamic_batching { priority_levels: 2 }", "from 1 to 2"),
        ("dynamic_batching { default_priority_level: 2 }", "needs priority_levels"),
        (
            "dynamic_batching { priority_levels: 2 default_priority_level: 1 "
            "preserve_ordering: true }",
            "preserve_ordering",
        ),
        (
            "dynamic_batching { priority_levels: 1 default_priority_level: 1 "
            "priority_queue_policy { key: 2 value {} } }",
            "no level of 1",
        ),
    ],
)
def test_settings_that_contradict_themselves_are_an_error(text: str, complaint: str) -> None:
    with pytest.raises(ModelConfigError, match=complaint):
        from_config(parse_config(text))


def test_effective_settings_say_what_the_file_says() -> None:
    serving = from_config(parse_config((RECORDED / "dynamic_full.pbtxt").read_text()))
    assert serving.max_rows == 16
    assert serving.is_batching
    assert serving.preferred_rows == (4, 8)
    assert serving.max_queue_delay_s == pytest.approx(0.0001)
    assert (serving.priority_levels, serving.default_priority) == (3, 2)
    assert serving.get_queue() == QueuePolicy(5.0, TimeoutAction.DELAY, True, 64)
    assert serving.get_queue(1) == QueuePolicy(0.001, TimeoutAction.REJECT, False, 8)
    assert serving.instances is None


def test_the_manifest_goes_over_the_file_key_by_key() -> None:
    base = from_config(parse_config("max_batch_size: 8 response_cache { enable: true }"))
    serving = apply_manifest(
        base,
        Serving.model_validate(
            {
                "max_queue_delay_s": 0.01,
                "instances": 2,
                "queue": {"max_queue_size": 3, "timeout_action": "delay"},
                "version_policy": {"all": True},
                "parameters": {"a": "b"},
                "warmup": [
                    {
                        "name": "w",
                        "inputs": {"x": {"datatype": "FP32", "shape": [64], "source": "random"}},
                    }
                ],
            }
        ),
    )
    assert serving.max_rows == 8
    assert serving.response_cache
    assert serving.is_batching
    document = to_json(complete(parse_config("max_batch_size: 8"), FREE, serving))
    assert document["max_batch_size"] == 8
    assert document["dynamic_batching"]["max_queue_delay_microseconds"] == 10_000
    assert document["dynamic_batching"]["default_queue_policy"]["max_queue_size"] == 3
    assert document["instance_group"][0]["count"] == 2
    assert document["version_policy"] == {"all": {}}
    assert document["parameters"] == {"a": {"string_value": "b"}}
    assert document["model_warmup"][0]["inputs"]["x"]["random_data"] is True
    assert document["response_cache"] == {"enable": True}


def test_what_is_completed_reads_back_as_itself() -> None:
    serving = from_config(parse_config((RECORDED / "dynamic_full.pbtxt").read_text()))
    message = complete(None, FREE, serving)
    assert to_json(parse_config(format_config(message)).message) == to_json(message)


@pytest.mark.parametrize(
    ("choice", "served"),
    [
        (VersionChoice(), (7,)),
        (VersionChoice(2), (3, 7)),
        (VersionChoice(None), (1, 3, 7)),
        (VersionChoice(None, (1, 5)), (1,)),
    ],
)
def test_a_version_policy_chooses(choice: VersionChoice, served: tuple[int, ...]) -> None:
    assert choice.choose([7, 1, 3]) == served


def test_a_file_of_the_version_goes_before_the_models(tmp_path: Path) -> None:
    folder = tmp_path / "net" / "1"
    folder.mkdir(parents=True)
    manifest = parse_manifest(json.dumps(MANIFEST))
    assert find_config(folder, manifest) is None
    assert build_serving(None, manifest) == ServingConfig()
    (tmp_path / "net" / "config.pbtxt").write_text("max_batch_size: 2")
    found = find_config(folder, manifest)
    assert build_serving(found, manifest).max_rows == 2
    (tmp_path / "net" / "current").symlink_to("1")
    assert find_config(tmp_path / "net" / "current", manifest) is not None
    (folder / "config.pbtxt").write_text("max_batch_size: 3")
    own = parse_manifest(json.dumps(MANIFEST | {"files": {"config.pbtxt": "0" * 64}}))
    assert build_serving(find_config(folder, own), own).max_rows == 3


def test_warm_up_files_are_below_the_versions_folder() -> None:
    config = parse_config(
        'model_warmup { name: "w" batch_size: 2 inputs { key: "x" value '
        '{ data_type: TYPE_FP32 dims: [64] input_data_file: "raw" } } }'
    )
    (sample,) = from_config(config).warmup
    assert sample.inputs["x"].source is WarmupSource.FILE
    assert sample.inputs["x"].file == "warmup/raw"
    assert sample.rows == 2


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_schema_does_not_clash_with_an_installed_tritonclient() -> None:
    pytest.importorskip("tritonclient.grpc.model_config_pb2")
    out = run_python(
        "from worker.engine.modelconfig.text import parse_config\n"
        "ours = parse_config('max_batch_size: 4').message\n"
        "from tritonclient.grpc.model_config_pb2 import ModelConfig\n"
        "print(ModelConfig.FromString(ours.SerializeToString()).max_batch_size)"
    )
    assert out == "4\n"


def test_a_model_without_a_config_needs_no_protobuf() -> None:
    out = run_python(
        "import sys; sys.modules['google.protobuf'] = None\n"
        "from agent.manifest import Serving\n"
        "from worker.engine.modelconfig.serving import ServingConfig, apply_manifest\n"
        "from worker.engine.modelconfig.source import find_config\n"
        "from worker.engine.modelconfig.text import parse_config\n"
        "from worker.errors import ModelConfigError\n"
        "print(apply_manifest(ServingConfig(), Serving(max_rows=4)).max_rows)\n"
        "try: parse_config('')\n"
        "except ModelConfigError as exc: print(exc)\n"
    )
    assert out == "4\na config.pbtxt needs protobuf to be read: pip install 'edgeward[serve]'\n"
