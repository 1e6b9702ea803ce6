"""LitServe: `python litserve_app.py PORT NAME=MODEL.onnx …`, one endpoint for each model."""

import base64
import sys
from typing import Any

import litserve as ls  # type: ignore[import-not-found]
import numpy as np
import onnxruntime as ort


class OnnxApi(ls.LitAPI):  # type: ignore[misc]
    """One session with one thread; batches where the server collects them."""

    def __init__(self, path: str, **options: Any) -> None:
        super().__init__(**options)
        self.path = path

    def setup(self, _device: str) -> None:
        """Open the model."""
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self.session = ort.InferenceSession(self.path, options, providers=["CPUExecutionProvider"])

    def decode_request(self, request: dict[str, Any]) -> Any:
        """Return the rows of one request."""
        data = base64.b64decode(request["b64"])
        return np.frombuffer(data, np.float32).reshape(request["shape"])

    def predict(self, x: Any) -> Any:
        """Answer one request."""
        return self.session.run(["y"], {"x": x})[0]

    def encode_response(self, y: Any) -> dict[str, Any]:
        """Return the answer as JSON."""
        return {"y": y.tolist()}


if __name__ == "__main__":
    port, *models = sys.argv[1:]
    apis = [
        OnnxApi(path, api_path=f"/{name}") for name, path in (item.split("=", 1) for item in models)
    ]
    ls.LitServer(apis, accelerator="cpu", workers_per_device=1).run(
        port=int(port), generate_client_file=False, host="127.0.0.1", log_level="error"
    )
