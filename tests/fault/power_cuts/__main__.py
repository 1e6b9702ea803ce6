"""`python -m tests.fault.power_cuts --cuts N --seed S --json`: cut the power N times."""

import argparse
import json
import sys
import time

from tests.fault.power_cuts.recording import Workload, record
from tests.fault.power_cuts.simulation import Figures, open_scratch, simulate

_PROGRESS_S = 1.0


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.fault.power_cuts", description=__doc__)
    parser.add_argument("--cuts", type=int, default=3000, help="how many (default: 3000)")
    parser.add_argument("--seed", type=int, default=1, help="of the run and of all chances")
    parser.add_argument("--rounds", type=int, default=4, help="length of the recorded run")
    parser.add_argument(
        "--synchronous",
        default="FULL",
        choices=("FULL", "NORMAL", "OFF"),
        help="SQLite's pragma; the product uses FULL, the others show what it is for",
    )
    parser.add_argument(
        "--acks-early", action="store_true", help="acknowledge before the commit, as a defect would"
    )
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    return parser.parse_args()


class _Progress:
    def __init__(self, cuts: int) -> None:
        self._cuts = cuts
        self._shown_s = time.monotonic()

    def show(self, done: int) -> None:
        if done == self._cuts or time.monotonic() - self._shown_s >= _PROGRESS_S:
            self._shown_s = time.monotonic()
            print(f"cut {done} of {self._cuts}", file=sys.stderr)


def _run(options: argparse.Namespace) -> Figures:
    workload = Workload(options.seed, options.rounds, options.synchronous, options.acks_early)
    with open_scratch() as folder:
        print("recording the run", file=sys.stderr)
        recording = record(workload, folder)
    return simulate(recording, options.seed, options.cuts, _Progress(options.cuts).show)


def main() -> int:
    """Run one simulation; the exit code is 0 where every cut was survived."""
    options = _parse()
    figures = _run(options)
    if options.json:
        print(json.dumps(figures.to_json()))
    else:
        for name, value in figures.to_json().items():
            print(f"{name}: {value}")
    return 0 if figures.is_clean() else 1


if __name__ == "__main__":
    sys.exit(main())
