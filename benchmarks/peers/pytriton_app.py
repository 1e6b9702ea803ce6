"""PyTriton: `python pytriton_app.py PORT NAME=MODEL.onnx …`."""

import sys
from typing import Any

import numpy as np
import onnxruntime as ort
from pytriton.decorators import batch  # type: ignore[import-not-found]
from pytriton.model_config import ModelConfig, Tensor  # type: ignore[import-not-found]
from pytriton.triton import Triton, TritonConfig  # type: ignore[import-not-found]


def make_infer(path: str) -> tuple[Any, Any]:
    """Return a session and the function that PyTriton calls with whole batches."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    @batch  # type: ignore[untyped-decorator]
    def infer(x: Any) -> dict[str, Any]:
        return {"y": session.run(["y"], {"x": x})[0]}

    return session, infer


if __name__ == "__main__":
    port, *models = sys.argv[1:]
    with Triton(config=TritonConfig(http_port=int(port), grpc_port=int(port) + 1)) as triton:
        for item in models:
            name, path = item.split("=", 1)
            session, infer = make_infer(path)
            x, y = session.get_inputs()[0], session.get_outputs()[0]
            triton.bind(
                model_name=name,
                infer_func=infer,
                inputs=[Tensor(name="x", dtype=np.float32, shape=tuple(x.shape[1:]))],
                outputs=[Tensor(name="y", dtype=np.float32, shape=tuple(y.shape[1:]))],
                config=ModelConfig(max_batch_size=32),
            )
        triton.serve()
