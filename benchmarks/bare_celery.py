"""The other side of `benchmarks.pipeline`: the same model behind plain Celery tasks."""

import sys
from pathlib import Path
from typing import Any

from celery import Celery


def infer(inputs: list[float]) -> list[float]:
    """Run the model on one row; replaced by a closure over the session in the worker."""
    raise NotImplementedError


def build_app(queue_url: str, model: Path) -> Celery:
    """Return a Celery app as its documentation would have it, threads pool, JSON, Redis results."""
    app = Celery("bare", broker=queue_url, backend=queue_url, set_as_current=False)
    app.conf.update(
        task_default_queue="bare",
        worker_prefetch_multiplier=4,
        worker_enable_remote_control=False,
        result_expires=600,
        redis_backend_use_ssl=None,
    )
    session: list[Any] = []

    def run(inputs: list[float]) -> list[float]:
        import numpy as np
        import onnxruntime

        if not session:
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = 1
            session.append(onnxruntime.InferenceSession(str(model), options))
        array = np.asarray([inputs], np.float32)
        answer: list[float] = session[0].run(None, {"x": array})[0][0].tolist()
        return answer

    app.task(run, name=infer.__name__, shared=False)
    return app


def main() -> None:
    """Run the bare worker: the same pool and number of threads as Edgeward's."""
    app = build_app(sys.argv[1], Path(sys.argv[2]))
    worker: Any = app.Worker(
        pool="threads",
        concurrency=2,
        queues=["bare"],
        without_gossip=True,
        without_mingle=True,
        without_heartbeat=True,
        loglevel="WARNING",
    )
    worker.start()


if __name__ == "__main__":
    main()
