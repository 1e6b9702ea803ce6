"""A console's mirror under loss, duplicates, reordering and lost ledgers.

The oracle is a device in a few lines, written from docs/protocol.md: it numbers what it
reports and sends again what is not acknowledged. What lies between may do anything. Its
records name its ledger, as the protocol says, or do not, as those of an old agent.
"""

import json
from random import Random
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from console.mirror import Change, DeviceMirror, Heard

AT = "2026-11-22T10:00:00.000Z"
JOBS = ("J0", "J1", "J2")
ENDS = ("succeeded", "failed", "canceled")
NEXT = {"": ["queued", "canceled"], "queued": ["running", "canceled"], "running": ["queued", *ENDS]}

steps = st.lists(
    st.tuples(
        st.sampled_from(["move", "deliver", "deliver", "repeat", "lose", "commit", "ledger"]),
        st.integers(0, 1000),
    ),
    max_size=80,
)


class Scene:
    """One device, what is on its way, and the mirror."""

    def __init__(self, *, names_ledger: bool) -> None:
        self.names_ledger = names_ledger
        self.mirror = DeviceMirror("box", acknowledges=True, follows_all=True, random=Random(1))
        self.now_s = 0.0
        self.ledgers = 0
        self.way: list[tuple[str, int, Heard]] = []
        self.delivered: dict[str, set[int]] = {}
        self.changes: list[tuple[str, Change]] = []
        self.begin_ledger()

    # --- the device ------------------------------------------------------------------------

    def begin_ledger(self) -> None:
        self.ledgers += 1
        self.ledger, self.boot = f"L{self.ledgers}", self.ledgers
        self.jobs: dict[str, tuple[str, int]] = {}
        self.records: list[Heard] = []
        self.delivered[self.ledger] = set()
        # The broker keeps the order of what a device says first on a connection.
        body = {"state": "online", "boot": self.boot, "conn": 1, "ledger": self.ledger}
        self.hear(Heard("status", "", body), self.ledger)

    def move(self, number: int) -> None:
        job_id = JOBS[number % len(JOBS)]
        state, rev = self.jobs.get(job_id, ("", 0))
        choices = NEXT.get(state)
        if choices is None:
            return
        new = choices[number // len(JOBS) % len(choices)]
        self.jobs[job_id] = (new, rev + 1)
        body = {"job_id": job_id, "state": new, "rev": rev + 1, "attempt": 1, "reason": None}
        head: dict[str, Any] = {"ts": AT, "seq": len(self.records) + 1, "boot": self.boot}
        if self.names_ledger:
            head["ledger"] = self.ledger
        self.records.append(Heard("job", job_id, {**head, "body": body}))
        self.send(len(self.records))

    def send(self, seq: int) -> None:
        self.way.append((self.ledger, seq, self.records[seq - 1]))

    # --- the way ---------------------------------------------------------------------------

    def deliver(self, number: int, *, keep: bool = False) -> None:
        if not self.way:
            return
        at = number % len(self.way)
        ledger, seq, heard = self.way[at] if keep else self.way.pop(at)
        self.delivered[ledger].add(seq)
        self.hear(heard, ledger)

    def lose(self, number: int) -> None:
        if self.way:
            self.way.pop(number % len(self.way))

    # --- the console -----------------------------------------------------------------------

    def hear(self, heard: Heard, ledger: str) -> None:
        for change in self.mirror.hear(heard, self.now_s, 0):
            self.changes.append((ledger, change))

    def commit(self) -> None:
        self.mirror.commit()
        self.now_s += 1.0
        for message in self.mirror.take_due(self.now_s):
            body = json.loads(message.payload)["body"]
            acked: Any = body.get("seq", body.get("acked_seq"))
            if acked is not None:
                wanted = set(range(1, acked + 1))
                assert wanted <= self.delivered[body["ledger"]], "acknowledged and never heard"

    def run(self, given_steps: list[tuple[str, int]]) -> None:
        for step, number in given_steps:
            match step:
                case "move":
                    self.move(number)
                case "deliver" | "repeat":
                    self.deliver(number, keep=step == "repeat")
                case "lose":
                    self.lose(number)
                case "commit":
                    self.commit()
                case "ledger":
                    self.begin_ledger()

    def settle(self) -> None:
        """Let the device send everything again, in order, as it does until it is acknowledged."""
        while self.way:
            self.deliver(0)
        for seq in range(1, len(self.records) + 1):
            self.send(seq)
            self.deliver(0)
        self.commit()


@settings(max_examples=300, deadline=None)
@given(steps, st.booleans())
def test_mirror_ends_where_the_device_is_and_acknowledges_only_what_it_heard(
    given_steps: list[tuple[str, int]], names_ledger: bool
) -> None:
    scene = Scene(names_ledger=names_ledger)
    scene.run(given_steps)
    scene.settle()

    assert scene.mirror.numbering.cumulative == len(scene.records)
    ended_before = find_ends(scene)
    for job_id, (state, rev) in scene.jobs.items():
        view = scene.mirror.jobs[job_id]
        if ended_before.get(job_id, scene.ledger) != scene.ledger:
            assert view.has_ended
        elif state in ENDS or not view.has_doubtful_rev:
            assert (view.state, view.rev) == (state, rev)


def find_ends(scene: Scene) -> dict[str, str]:
    """Return by which ledger each job ended; check that nothing follows its end."""
    ends: dict[str, str] = {}
    revs: dict[str, tuple[str, int]] = {}
    for ledger, change in scene.changes:
        if change.kind != "state" or change.job is None:
            continue
        job = change.job
        assert job.job_id not in ends, "something followed an end"
        known_ledger, known_rev = revs.get(job.job_id, (ledger, 0))
        if known_ledger == ledger and not job.has_doubtful_rev:
            assert job.rev > known_rev
        revs[job.job_id] = (ledger, job.rev)
        if job.has_ended:
            ends[job.job_id] = ledger
    return ends
