"""Power cuts, simulated: what is left of the ledger after each, and what of it was promised.

A real ledger run in a process of its own is recorded call by call (`recorder.c`,
`recording`); a model of a disk that keeps only what was synced (`disk`) makes the
files that a cut at any point may leave; each is opened with the product's own code
and compared with what the run had acknowledged (`promises`).

    python -m tests.fault.power_cuts --cuts 10000 --seed 7 --json
"""
