"""What was measured to be best of a version, as the engine asks for it when it loads one.

Reads the record of a staging and says whether it still holds on this box. Runs no model.
"""

import logging
from pathlib import Path

from agent.choice import compute_digest, find_choice, identify_trial
from platforms.probe import probe_power_mode
from platforms.selection import Preference
from platforms.spec import PlatformSpec

log = logging.getLogger(__name__)

_ROOT = Path("/")


def find_preference(
    choices: Path, folder: Path, spec: PlatformSpec, threads: int
) -> Preference | None:
    """Return what was measured to be best of a version; None where that was on another box.

    Args:
        choices: the folder of all records.
        folder: of the version.
        spec: the box.
        threads: inside one operator.
    """
    try:
        digest = compute_digest(folder)
    except OSError:
        return None
    record = find_choice(choices, digest)
    chosen = record.chosen if record is not None else None
    if record is None or chosen is None or chosen.runtime is None:
        return None
    now = identify_trial(chosen.sha256, chosen.runtime, spec, threads, probe_power_mode(_ROOT))
    if chosen.identity != now:
        log.info("%s: measured under other conditions, so the publisher's order stands", folder)
        return None
    return Preference(chosen.file, chosen.runtime, f"measured on this box: {record.reason}")
