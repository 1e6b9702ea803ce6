"""Triton's python backend for the models of `tests.harness.v2_models`; stands as `1/model.py`."""

import json
from typing import Any

import triton_python_backend_utils as backend  # type: ignore[import-not-found]


class TritonPythonModel:
    """Answers as the ONNX model of the same name does."""

    def initialize(self, arguments: dict[str, Any]) -> None:
        """Read which model this is."""
        config = json.loads(arguments["model_config"])
        self.inputs = [item["name"] for item in config["input"]]
        self.outputs = [item["name"] for item in config["output"]]

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answer each request by itself."""
        return [self._answer(request) for request in requests]

    def _answer(self, request: Any) -> Any:
        found = [backend.get_input_tensor_by_name(request, name).as_numpy() for name in self.inputs]
        values = [found[0] + found[1], found[0] - found[1]] if len(found) == 2 else found
        tensors = [
            backend.Tensor(name, value) for name, value in zip(self.outputs, values, strict=True)
        ]
        return backend.InferenceResponse(tensors)
