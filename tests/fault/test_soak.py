"""Half a minute of the soak; docs/reliability.md has the half hour."""

from pathlib import Path

import pytest

from tests.fault.soak import Load, Soak, judge
from tests.fault.trend import find_trend
from tests.harness.waiting import require_binary

SECONDS = 20.0
# Of open files and threads, from after the start to the end: room for what comes and goes.
SPARE = 12


@pytest.mark.timeout(180)
def test_twenty_seconds_of_mixed_load_leave_no_files_and_threads_behind(tmp_path: Path) -> None:
    require_binary("mosquitto")
    soak = Soak(tmp_path, Load(SECONDS, rate=20, sample_s=1.0, seed=5))
    document = soak.run()

    assert document["findings"] == []
    assert document["became_quiet"], document
    assert document["files_done"] == document["files"]
    assert document["jobs"] >= SECONDS * 20 * 0.9
    warm = [sample for sample in soak.samples if sample.at_s >= SECONDS / 2]
    for name in ("agent_fds", "agent_threads", "worker_fds", "worker_threads"):
        values = [getattr(sample, name) for sample in warm]
        assert values[-1] <= values[0] + SPARE, (name, values)
    assert judge(soak.samples, SECONDS / 4)["ledger_bytes_per_ended_job"]["first_half"] > 0


def test_a_steady_series_with_scatter_is_within_noise_and_a_leak_is_not() -> None:
    times_s = [10.0 * index for index in range(60)]
    steady = [100.0 + 3 * (-1) ** index for index in range(60)]
    leaking = [value + 0.3 * index for index, value in enumerate(steady)]

    assert find_trend(times_s, steady).is_within_noise
    assert not find_trend(times_s, leaking).is_within_noise
    assert find_trend(times_s, leaking).slope_per_h == pytest.approx(108, rel=0.05)
