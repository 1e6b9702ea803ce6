"""Boxes recorded under `tests/data/probes`."""

import json
from pathlib import Path

from platforms.detect import detect_platform
from platforms.probe import ProbeData
from platforms.spec import PlatformSpec

FOLDER = Path(__file__).parents[1] / "data" / "probes"
NAMES = tuple(sorted(path.stem for path in FOLDER.glob("*.json")))


def read_probe(name: str) -> ProbeData:
    return ProbeData.from_json(json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8")))


def detect_recorded(name: str) -> PlatformSpec:
    return detect_platform(read_probe(name))
