"""Power cuts during updates, simulated: which version serves after each, and is it whole.

A real run of installations, updates, roll-backs and removals is recorded call by call (the recorder
of `tests.fault.power_cuts`); a model of a tree of folders that keeps only what was synced (`tree`)
makes what a cut at any point may leave; the product's own code goes on from there (`walk`).

    python -m tests.fault.update_cuts --cuts 3000 --seed 7 --json
"""
