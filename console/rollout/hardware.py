"""Names the hardware class of a device from what it says of its platform.

Pure. A class is what a rollout judges on its own: boxes in one class should behave alike
with the same model. It says three things, joined by a slash:

- the architecture: `x86_64`, `aarch64`, …;
- what infers: the usable accelerators' names, else the board, else the processor's model;
- the memory that the agent may use, rounded up to a power of two of GiB (of MiB below one).

So `x86_64/core-i5-8250u/8g`, `aarch64/raspberry-pi-5-model-b/8g`, `aarch64/orin-nano/8g`.
`PlatformSpec.hardware_class` is coarser on purpose: it says which artifacts can run, not how
well they do.

Invariant: never fails; a device that says nothing usable is `unknown`.
"""

import re
from collections.abc import Mapping
from math import ceil, log2
from typing import Any

UNKNOWN = "unknown"
_MIB = 2**20 / 10**6
"""In MB of 10⁶ bytes, the unit of `PlatformSpec`."""
_TOLERANCE = 1.1
"""A limit of 8.2 GiB is still a box of 8: what is above comes from rounding, not from a chip."""
_PART_LENGTH = 40
_NOISE = re.compile(
    r"\((?:r|tm|c)\)|@.*$|\bwith .*$|\b(?:cpu|processor|\d+-core|rev(?:ision)? [\d.]+)\b", re.I
)
_MAKERS = re.compile(r"^(?:genuine\s+)?(?:intel|amd|nvidia|apple)\s+(?=\S)", re.I)


def classify_hardware(platform: Mapping[str, Any] | None) -> str:
    """Return the hardware class of a device: at most 100 characters of `[a-z0-9._/+-]`.

    Args:
        platform: `PlatformSpec.to_json`'s form, as in the body of `info`. Whatever is missing or
            of the wrong form counts as unknown.
    """
    if not platform:
        return UNKNOWN
    arch = _slug(platform.get("arch"))
    engine = _name_accelerators(platform) or _slug(platform.get("board")) or _name_cpu(platform)
    parts = [part for part in (arch, engine, _name_memory(platform.get("memory_mb"))) if part]
    return "/".join(parts) or UNKNOWN


def _name_accelerators(platform: Mapping[str, Any]) -> str:
    found = platform.get("accelerators")
    if not isinstance(found, list | tuple):
        return ""
    usable = [item for item in found if isinstance(item, Mapping) and item.get("usable", True)]
    names = {_slug(item.get("name")) or _slug(item.get("kind")) for item in usable}
    return "+".join(sorted(names - {""}))[:_PART_LENGTH]


def _name_cpu(platform: Mapping[str, Any]) -> str:
    return _slug(platform.get("cpu_model"))


def _name_memory(memory_mb: object) -> str:
    if isinstance(memory_mb, bool) or not isinstance(memory_mb, int | float):
        return ""
    if not 1 <= memory_mb < 1e12:
        return ""
    mib = 2 ** max(0, ceil(log2(memory_mb / _MIB / _TOLERANCE)))
    return f"{mib // 1024}g" if mib >= 1024 else f"{mib}m"


def _slug(text: object) -> str:
    """Return a name in lower case without marks, frequencies and revisions."""
    if not isinstance(text, str):
        return ""
    plain = _MAKERS.sub("", _NOISE.sub(" ", text).strip())
    return re.sub(r"[^a-z0-9._]+", "-", plain.lower())[:_PART_LENGTH].strip("-._")
