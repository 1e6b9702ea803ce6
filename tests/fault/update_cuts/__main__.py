"""`python -m tests.fault.update_cuts --cuts N --seed S --json`: cut the power N times."""

import argparse
import json
import logging
import sys
import time

from tests.fault.power_cuts.simulation import open_scratch
from tests.fault.update_cuts.walk import Figures, publish, record, walk
from tests.fault.update_cuts.workload import DEFECTS

_PROGRESS_S = 1.0


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.fault.update_cuts", description=__doc__)
    parser.add_argument("--cuts", type=int, default=1500, help="how many (default: 1500)")
    parser.add_argument("--seed", type=int, default=1, help="of all chances")
    parser.add_argument("--plant", choices=DEFECTS, help="make the product worse, to be found out")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    return parser.parse_args()


def _run(options: argparse.Namespace) -> Figures:
    shown_s = time.monotonic()

    def show(done: int) -> None:
        nonlocal shown_s
        if done == options.cuts or time.monotonic() - shown_s >= _PROGRESS_S:
            shown_s = time.monotonic()
            print(f"cut {done} of {options.cuts}", file=sys.stderr)

    with open_scratch() as folder:
        source = publish(folder)
        print("recording the run", file=sys.stderr)
        recording = record(folder, source, options.plant)
        return walk(recording, source, options.seed, options.cuts, show)


def main() -> int:
    """Walk once; the exit code is 0 where every cut was survived."""
    options = _parse()
    # That updates are rolled back is what is looked at here.
    logging.disable(logging.WARNING)
    figures = _run(options)
    if options.json:
        print(json.dumps(figures.to_json()))
    else:
        for name, value in figures.to_json().items():
            print(f"{name}: {value}")
    return 0 if figures.bad_cuts == 0 else 1


if __name__ == "__main__":
    sys.exit(main())
