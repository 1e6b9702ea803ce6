"""The whole box under random faults; docs/reliability.md has the same with 20,000 jobs."""

from pathlib import Path

import pytest

from tests.fault.chaos.__main__ import summarise
from tests.fault.chaos.plan import make_plan
from tests.fault.chaos.scenario import Scenario
from tests.harness.waiting import require_binary

JOBS, KILLS, SEED = 1000, 40, 7


@pytest.mark.timeout(300)
def test_a_thousand_jobs_survive_forty_kills(tmp_path: Path) -> None:
    require_binary("mosquitto")
    scenario = Scenario(tmp_path, make_plan(JOBS, KILLS, SEED))
    outcome = scenario.run()
    document = summarise(outcome, tmp_path)

    print(f"recovery p95 {document['recovery_p95_s']} s, {document['duration_s']} s in all")
    found = [document["findings"][:5], scenario.cast.describe_logs()]
    assert outcome.report.findings == [], found
    assert outcome.is_quiet, found
    assert (document["lost"], document["double"], document["illegal"]) == (0, 0, 0)
    assert (document["jobs"], document["kills"]) == (JOBS, KILLS)
