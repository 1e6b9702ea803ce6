"""Reading heartbeats for months keeps nothing of them."""

import json
import tracemalloc

from agent.commands import new_id
from agent.tasks import HeartbeatBody

IDS = 3_000


def test_ids_in_heartbeats_are_not_kept() -> None:
    def read(count: int) -> None:
        for _ in range(count):
            beat = {"worker": "w", "slot": "s", "held": [new_id()], "started": [new_id()]}
            HeartbeatBody.model_validate_json(json.dumps(beat))

    read(10)
    tracemalloc.start()
    try:
        read(IDS)
        kept_bytes, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # An id takes 75 bytes: all of them would be 450 kB.
    assert kept_bytes < 20 * IDS
