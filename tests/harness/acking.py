"""A small console that does its half of the protocol: counts, acknowledges, answers syncs, resends.

Written from docs/protocol.md, apart from the product's own console, so that one defect
cannot hide in both.
"""

import json
from typing import Any

from tests.harness.box import RecordingConsole, make_body, make_envelope

_RESENT_AT_ONCE = 500


class AckingConsole(RecordingConsole):
    """Does what it should whenever a test calls `work`."""

    def __init__(self, port: int) -> None:
        super().__init__(port)
        self.wanted: dict[str, bytes] = {}
        """Submits by job id; sent again until a state answers."""
        self.seen: set[int] = set()
        self.ledger: str | None = None
        self.ledgers: list[str] = []
        self.resent = 0
        self.acked = 0
        self._read = 0

    def want(self, count: int) -> list[str]:
        """Publish submits and remember them."""
        ids = self.submit_many(count)
        self.wanted |= dict.fromkeys(ids, make_envelope(make_body()))
        return ids

    def send(self, kind: str, **body: Any) -> None:
        """Publish an `ack` or a `sync`."""
        self.publish(f"edgeward/v1/box-1/c2d/{kind}", make_envelope(body, kind))

    def work(self, *, answers: bool = True) -> None:
        """Take in what has come; acknowledge it, and answer the newest sync."""
        fresh, self._read = self.messages[self._read :], len(self.messages)
        asked = False
        for topic, document in fresh:
            if topic.endswith("/d2c/sync"):
                self._meet(document["body"]["ledger"])
                asked = True
            if "seq" in document:
                self.seen.add(document["seq"])
            if document.get("type") == "event.gap":
                body = document["body"]
                self.seen |= set(range(body["from_seq"], body["to_seq"] + 1))
        upto = self.acked
        while upto + 1 in self.seen:
            upto += 1
        if upto > self.acked and answers:
            self.acked = upto
            self.send("ack", seq=upto, ledger=self.ledger)
        if asked and answers:
            self.send("sync", ledger=self.ledger, acked_seq=self.acked)
            self._resend()

    def _meet(self, ledger: str) -> None:
        if ledger == self.ledger:
            return
        self.ledger = ledger
        self.ledgers.append(ledger)
        # Numbers begin anew. (Records of the new ledger follow its first sync.)
        self.seen.clear()
        self.acked = 0

    def _resend(self) -> None:
        open_ids = [job_id for job_id in self.wanted if not self.last_state(job_id)]
        for job_id in open_ids[:_RESENT_AT_ONCE]:
            self.resent += 1
            self._client.publish(self.topics.submit(job_id), self.wanted[job_id], qos=1)

    def sees_all(self, ids: list[str]) -> bool:
        """Work, and say whether every job has ended and brought its result."""
        self.work()
        return all(job_id in self.results for job_id in ids) and all(
            (self.last_state(job_id) or {}).get("state") == "succeeded" for job_id in ids
        )


def count_distinct(results: list[dict[str, Any]]) -> int:
    """Return how many different result records there are; the same may come often."""
    return len({json.dumps(body, sort_keys=True) for body in results})
