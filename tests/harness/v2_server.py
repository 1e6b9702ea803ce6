"""A small V2 server over HTTP for tests: one ONNX model, binary tensors both ways.

Written from the protocol, with nothing of the client under test. `hang` is a model that
never answers.

    python -m tests.harness.v2_server MODEL_FILE    # prints its port
"""

import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import onnxruntime

HEADER = "Inference-Header-Content-Length"


class Handler(BaseHTTPRequestHandler):
    """Answers metadata and `infer` of the models `proof` and `hang`."""

    protocol_version = "HTTP/1.1"
    session: Any
    never = threading.Event()

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base's name
        """Stay silent."""

    def answer(self, status: int, head: Any, tail: bytes = b"") -> None:
        """Send JSON and what follows it."""
        text = json.dumps(head).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(text) + len(tail)))
        if tail:
            self.send_header(HEADER, str(len(text)))
        self.end_headers()
        self.wfile.write(text + tail)

    def do_GET(self) -> None:
        """Describe the model."""
        name = self.path.removeprefix("/v2/models/").partition("/")[0]
        if name not in ("proof", "hang"):
            self.answer(404, {"error": f"no model {name}"})
            return
        x = {"name": "x", "datatype": "FP32", "shape": [-1, 1, 8, 8]}
        y = {"name": "y", "datatype": "FP32", "shape": [-1, 10]}
        self.answer(200, {"name": name, "versions": ["1"], "inputs": [x], "outputs": [y]})

    def do_POST(self) -> None:
        """Run the model."""
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if "/hang/" in self.path:
            self.never.wait()
        split = int(self.headers[HEADER])
        (item,) = json.loads(body[:split])["inputs"]
        x = np.frombuffer(body[split:], "<f4").reshape(item["shape"])
        if len(x) == 7:
            self.answer(503, {"error": "too busy for seven"})
            return
        (y,) = self.session.run(["y"], {"x": x})
        size = {"binary_data_size": y.nbytes}
        described = {"name": "y", "datatype": "FP32", "shape": list(y.shape), "parameters": size}
        self.answer(200, {"model_name": "proof", "outputs": [described]}, y.tobytes())
        # The client keeps its connection and must notice that this end closed it.
        self.close_connection = len(x) == 3


def main() -> None:
    """Serve until killed."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    Handler.session = onnxruntime.InferenceSession(sys.argv[1], options)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    print(server.server_address[1], flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
