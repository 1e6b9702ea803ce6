"""Triton's python backend: one ONNX model; stands as `1/model.py` beside `model.onnx`."""

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import triton_python_backend_utils as backend  # type: ignore[import-not-found]


class TritonPythonModel:
    """Runs each request of a batch together."""

    def initialize(self, _arguments: dict[str, Any]) -> None:
        """Open the model with one thread, as every server here does."""
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        path = Path(__file__).with_name("model.onnx")
        self.session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answer all requests that Triton hands over at once."""
        parts = [backend.get_input_tensor_by_name(item, "x").as_numpy() for item in requests]
        x = parts[0] if len(parts) == 1 else np.concatenate(parts)
        y = self.session.run(["y"], {"x": x})[0]
        answers, start = [], 0
        for part in parts:
            rows = np.ascontiguousarray(y[start : start + len(part)])
            start += len(part)
            answers.append(backend.InferenceResponse([backend.Tensor("y", rows)]))
        return answers
