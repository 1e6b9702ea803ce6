"""Make the tiny model that proves a runtime, and its right answer.

Writes `proof.onnx` and `proof.json` into `platforms/runtimes/data/`. The answer is
computed here in float64 by plain NumPy, never by a runtime. One convolution and one
matrix product: the kernels where a library built for another CPU dies.

    python benchmarks/make_proof_model.py
"""

import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

FOLDER = Path(__file__).parent.parent / "platforms" / "runtimes" / "data"
SIDE, CHANNELS, CLASSES = 8, 4, 10
SEED = 20260822

Float = NDArray[np.float64]


def compute_answer(x: Float, kernel: Float, weights: Float, bias: Float) -> Float:
    """Return the right answer: 3x3 convolution without padding, ReLU, matrix product, bias."""
    side = SIDE - 2
    features = np.zeros((len(x), CHANNELS, side, side))
    for row in range(side):
        for column in range(side):
            patch = x[:, 0, row : row + 3, column : column + 3]
            features[:, :, row, column] = np.einsum("nij,cij->nc", patch, kernel[:, 0])
    answer: Float = np.maximum(features, 0).reshape(len(x), -1) @ weights + bias
    return answer


def build_model(kernel: Float, weights: Float, bias: Float) -> bytes:
    """Return the ONNX file: `x` float32[N, 1, 8, 8] to `y` float32[N, 10]."""
    constants = {"kernel": kernel, "weights": weights, "bias": bias}
    graph = helper.make_graph(
        [
            helper.make_node("Conv", ["x", "kernel"], ["features"], kernel_shape=[3, 3]),
            helper.make_node("Relu", ["features"], ["active"]),
            helper.make_node("Flatten", ["active"], ["flat"]),
            helper.make_node("Gemm", ["flat", "weights", "bias"], ["y"]),
        ],
        "edgeward-proof",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 1, SIDE, SIDE])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", CLASSES])],
        [numpy_helper.from_array(v.astype(np.float32), name) for name, v in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    return bytes(model.SerializeToString(deterministic=True))


def main() -> None:
    """Write both files."""
    random = np.random.default_rng(SEED)

    def draw(*shape: int) -> Float:
        # Rounded to float32, so that model and answer start from the same numbers.
        return random.normal(0, 0.5, shape).astype(np.float32).astype(np.float64)

    kernel, bias = draw(CHANNELS, 1, 3, 3), draw(CLASSES)
    weights = draw(CHANNELS * (SIDE - 2) ** 2, CLASSES)
    x = draw(2, 1, SIDE, SIDE)
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / "proof.onnx").write_bytes(build_model(kernel, weights, bias))
    answer = {
        "inputs": {"x": x.tolist()},
        "outputs": {"y": compute_answer(x, kernel, weights, bias).tolist()},
        "tolerance": 1e-4,
    }
    (FOLDER / "proof.json").write_text(json.dumps(answer) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
