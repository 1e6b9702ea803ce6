"""How many threads a session gets, and how many runs of it go on at once.

Owns two divisions, and how many inferences a box runs at the same time. Where the cores come
from is detection's matter: they are the cgroup's (`PlatformSpec.cores`), which `os.cpu_count()`
does not know.
"""

import math


def compute_threads(cores: float, instances: int) -> int:
    """Return the threads inside one operator for each of `instances` sessions, at least 1.

    With 2 cores two sessions of one thread each beat one of two (314 against 189–219
    requests/s for a MobileNetV2-like CNN). Source: our measurement, x86-64, 2 vCPU,
    Triton 2.51 against onnxruntime inline.

    Raises:
        ValueError: there is no instance.
    """
    if instances < 1:
        msg = f"there must be 1 instance or more, not {instances}"
        raise ValueError(msg)
    return max(1, math.floor(cores) // instances)


def compute_sizes(cores: float, concurrency: int) -> tuple[int, int]:
    """Return the threads inside one operator, and how many such runs the cores allow at once.

    Args:
        cores: of the box.
        concurrency: how many inferences of one model should be able to run at the same time.

    Raises:
        ValueError: it is not even one.
    """
    threads = compute_threads(cores, concurrency)
    return threads, max(1, int(cores) // threads)


def choose_concurrency(cores: float, configured: int) -> int:
    """Return how many inferences run at the same time: as configured, else one per core.

    Args:
        cores: of the box.
        configured: `worker.concurrency`; 0 where the box decides.
    """
    return configured or max(1, int(cores))
