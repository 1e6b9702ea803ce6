"""A link that is half-open is found, and nothing is lost; docs/reliability.md has keepalive 20."""

from pathlib import Path

import pytest

from tests.fault.half_open import ABANDONED, STALLED, measure_mqtt, measure_queue
from tests.harness.waiting import require_binary

KEEPALIVE_S = 5
# The agent's status file is two seconds old at most.
STATUS_S = 2
BOTH = pytest.mark.parametrize("how", [ABANDONED, STALLED])


@pytest.mark.timeout(180)
@BOTH
def test_half_open_mqtt_link_is_found_within_two_keepalives(tmp_path: Path, how: str) -> None:
    require_binary("mosquitto")
    figures = measure_mqtt(tmp_path, how, KEEPALIVE_S)
    assert figures["found_s"] <= 2 * KEEPALIVE_S + STATUS_S, figures
    assert (figures["lost"], figures["double"]) == (0, 0), figures
    assert figures["jobs"] > 10


@pytest.mark.timeout(180)
@BOTH
def test_jobs_run_on_after_a_half_open_link_to_the_queue_broker(tmp_path: Path, how: str) -> None:
    require_binary("mosquitto")
    figures = measure_queue(tmp_path, how)
    assert figures["runs_on_after_s"] <= 40, figures
    assert (figures["lost"], figures["double"]) == (0, 0), figures
