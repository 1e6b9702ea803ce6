"""One box with versions of the digits net, a console, and clients of its HTTP API."""

import http.client
import json
import threading
from contextlib import closing
from pathlib import Path
from typing import Any

from agent.repository import ModelRepository
from console.embedded import find_free_port
from tests.harness.box import Box, RecordingConsole
from tests.harness.brokers import MqttProcess, QueueProcess
from tests.harness.known_box import seed_platform
from tests.harness.releases import make_pixels, write_digits
from tests.harness.waiting import wait_until

QUICK = {"EDGEWARD_UPDATES__POINT_S": "0.05"}
PROBATION = {"duration_s": 1.0, "min_failures": 2}


class UpdateBox:
    """One box with its console, and clients of its HTTP API."""

    def __init__(
        self,
        tmp_path: Path,
        mqtt: MqttProcess,
        queue: QueueProcess,
        *,
        runtimes: tuple[str, ...] = ("ort",),
        files: dict[str, Path] | None = None,
        **settings: str,
    ) -> None:
        self.tmp_path = tmp_path
        self.port = find_free_port()
        http = {"EDGEWARD_HTTP__PORT": str(self.port)}
        self.box = Box(tmp_path, mqtt, queue, **{**http, **QUICK, **settings})
        seed_platform(self.box.data_dir, *runtimes)
        self.models = ModelRepository(self.box.data_dir / "models")
        self.models.add(write_digits(tmp_path / "v1", files=files))
        self.console = RecordingConsole(mqtt.port)
        self.box.start("agent")
        self.box.start("worker")
        self.box.start("maintenance")
        wait_until(lambda: self.console.find("status"), 30, "online")

    def close(self) -> None:
        self.console.close()
        self.box.close()

    def add(self, version: str, **options: Any) -> None:
        """Put a version into the repository, inactive, as a fetch would."""
        self.models.add(write_digits(self.tmp_path / version, version, **options), activate=False)

    def update(self, version: str, **params: Any) -> str:
        params = {"probation": PROBATION, **params}
        body = {"handler": "update", "model": "digits", "version": version, "params": params}
        return self.console.submit(body)

    def wait_end(self, job_id: str) -> dict[str, Any]:
        try:
            return self.console.wait_end(job_id, 60)
        except AssertionError:
            print(self.box.read_log()[-6000:])
            raise

    def get_active(self) -> str:
        return self.models.get_version("digits").release

    def serves(self) -> bool:
        """Say whether the HTTP API answers."""
        try:
            return bool(self.answer())
        except (OSError, http.client.HTTPException):
            return False

    def get_reported(self, name: str = "digits") -> dict[str, Any]:
        documents = self.console.find("reported")
        return documents[-1]["body"]["models"].get(name, {}) if documents else {}

    def answer(self) -> str:
        """Ask the HTTP API for one answer; return the version that gave it."""
        with closing(Client(self.port)) as client:
            return client.ask()


class Client:
    """Asks the HTTP API over one connection, which may be cut by a crash.

    Args:
        port: of the API.
    """

    def __init__(self, port: int) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
        pixels = make_pixels(1).reshape(-1).tolist()
        tensor = {"name": "pixels", "datatype": "FP32", "shape": [1, 64], "data": pixels}
        self._body = json.dumps({"inputs": [tensor]})

    def ask(self) -> str:
        """Return the version that answered.

        Raises:
            OSError, http.client.HTTPException: nobody did.
        """
        try:
            self._connection.request("POST", "/v2/models/digits/infer", self._body)
            response = self._connection.getresponse()
            document = json.loads(response.read())
        except (OSError, http.client.HTTPException):
            self._connection.close()
            raise
        if response.status != 200:
            raise http.client.HTTPException(f"{response.status}: {document}")
        return str(document["model_version"])

    def close(self) -> None:
        """Let go of the connection."""
        self._connection.close()


class Load:
    """Clients that ask without a pause, and count."""

    def __init__(self, box: UpdateBox, clients: int = 8) -> None:
        self.versions: list[str] = []
        self.failures: list[str] = []
        self._over = threading.Event()
        self._threads = [
            threading.Thread(target=self._ask, args=(box,), daemon=True) for _ in range(clients)
        ]

    def __enter__(self) -> "Load":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join(20)

    def _ask(self, box: UpdateBox) -> None:
        client = Client(box.port)
        while not self._over.is_set():
            try:
                self.versions.append(client.ask())
            except (OSError, http.client.HTTPException) as exc:
                self.failures.append(str(exc))
        client.close()
