"""Keeps libraries from telling their makers about this box and its models.

Edgeward's users are promised that data does not leave. Two libraries report unless they are told
not to: onnxruntime's own packages for Linux, from 1.29 on, each session with the model's file name,
hashes and the machine, to Microsoft (what cannot be sent is kept in a database below `~/.cache`);
OpenVINO, when it is imported, to Google's statistics for Intel.

Source: onnxruntime's docs/Privacy.md; openvino/tools/ovc/telemetry_utils.py; seen with 1.32 and
2026.4 (tests/integration/test_telemetry.py).
"""

import os
import sys

_OFF = {"ORT_DISABLE_TELEMETRY": "1", "DO_NOT_TRACK": "1"}
_REPORTER = "openvino_telemetry"


def forbid_telemetry() -> None:
    """Turn telemetry off for this process; before a library is imported. Harmless when repeated."""
    for name, value in _OFF.items():
        os.environ.setdefault(name, value)
    if _REPORTER not in sys.modules:
        # Its import fails from now on, and OpenVINO takes its own stub in its place.
        sys.modules[_REPORTER] = None  # type: ignore[assignment]
