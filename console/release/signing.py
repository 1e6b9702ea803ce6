"""Signing what waits, and publishing what then has all its signatures.

Owns one run of `release sign`: which metadata gets which signatures, in what order it
is published, and what goes on waiting.

    root ─▶ targets ─▶ publishers ─▶ snapshot ─▶ timestamp      the order of signing
    targets, publishers ─▶ snapshot ─▶ root ─▶ timestamp        the order of publishing

Invariants: nothing is published that a box would refuse together with the rest. A change
that lacks signatures, its own or of what must be signed anew with it, is held back, and
the rest goes on without it: a root that waits in an office must not let the timestamp run
out. Metadata is signed anew when its keys changed, and when two thirds of its time are
over and the keys are at hand.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

from tuf.api.exceptions import UnsignedMetadataError
from tuf.api.metadata import Metadata, MetaFile, Root, Snapshot, Targets, Timestamp

from console.release.repository import ReleaseRepository, Signed, find_delegations
from worker.update.trust import SIGNED_AT

if TYPE_CHECKING:
    from console.release.keys import KeyRing

_RENEW_AT = 2 / 3
"""Of its time, after which metadata is signed anew."""
_HELD_BACK: tuple[frozenset[str], ...] = (
    frozenset(),
    frozenset({Root.type}),
    frozenset({Targets.type}),
    frozenset({Root.type, Targets.type}),
)
"""What a run does without, tried in this order."""


@dataclass(frozen=True, slots=True)
class SigningReport:
    """What a run of `release sign` did."""

    published: Mapping[str, int]
    """Versions of the roles that boxes see now and did not before."""
    waiting: Mapping[str, str]
    """Roles that go on waiting, with what they lack."""


def sign_repository(
    repository: ReleaseRepository, ring: "KeyRing", days: Mapping[str, int] | None = None
) -> SigningReport:
    """Sign all that the keys at hand may sign, and publish what is then complete.

    Args:
        repository: to be signed; its lock must be held.
        ring: the keys at hand.
        days: how long snapshot and timestamp hold, in place of what the root says.

    Raises:
        ReleaseRepositoryError: there is no repository.
        SigningKeyError: a key cannot be read.
    """
    repository.get_current(Root.type)
    waiting: dict[str, str] = {}
    for held_back in _HELD_BACK:
        run = _Run(repository, ring, days or {}, held_back)
        complete = run.sign()
        waiting = {**run.waiting, **waiting}
        if complete:
            break
    else:
        return SigningReport({}, waiting)
    for signed in run.changed:
        repository.publish(signed)
    for signed in run.changed:
        repository.remove_staged(signed.role)
    for role in repository.list_staged():
        waiting.setdefault(role, "waits for others to be signed")
    published = {signed.role: signed.version for signed in run.changed}
    still = {role: text for role, text in waiting.items() if role not in published}
    return SigningReport(published, still)


class _Run:
    """One try, without the staged changes of some roles."""

    def __init__(
        self,
        repository: ReleaseRepository,
        ring: "KeyRing",
        days: Mapping[str, int],
        held_back: frozenset[str],
    ) -> None:
        self._repository = repository
        self._ring = ring
        self._now = repository.clock()
        self._held_back = held_back
        self._days = {**repository.get_days(), **days}
        self.waiting: dict[str, str] = {}
        self.changed: list[Signed] = []
        """To be published, in this order."""

    def sign(self) -> bool:
        """Sign everything; say whether what is now complete may be published."""
        root = self._settle_root()
        if root is None:
            return False
        targets = self._settle(Targets.type, root)
        if targets is None:
            return False
        found = [targets]
        for publisher in find_delegations(targets):
            signed = self._settle(publisher, targets)
            if signed is None:
                return False
            found.append(signed)
        snapshot = self._make_snapshot(root, found)
        timestamp = None if snapshot is None else self._make_timestamp(root, snapshot)
        if snapshot is None or timestamp is None:
            return False
        top = [root] if self._is_new(root) else []
        self.changed = [item for item in (*found, snapshot) if self._is_new(item)]
        self.changed += [*top, timestamp]
        return True

    def _settle_root(self) -> Signed | None:
        """Return the newest root that is complete."""
        published = self._repository.find_published(Root.type)
        if Root.type in self._held_back:
            return published
        staged = self._repository.find_staged(Root.type)
        if staged is None and published is not None and self._can_renew(published, published):
            staged = self._repository.stage(Root.type, lambda _: None)
        if staged is None:
            return published
        before = staged if published is None else published
        self._add_signatures(staged, before, staged)
        staged = self._repository.write_staged(Root.type, staged.metadata)
        result = staged.metadata.signed.get_root_verification_result(
            None if published is None else published.metadata.signed,
            staged.metadata.signed_bytes,
            staged.metadata.signatures,
        )
        if result:
            return staged
        missing = max(result.first.missing, result.second.missing)
        self.waiting[Root.type] = f"lacks {missing} signature(s) of keys of the root"
        return published

    def _settle(self, role: str, delegator: Signed) -> Signed | None:
        """Return the newest metadata of a role that is complete by its delegator."""
        published = self._repository.find_published(role)
        valid = published if _is_complete(published, delegator) else None
        if valid is not None and role in self._held_back:
            return valid
        staged = self._repository.find_staged(role)
        if staged is None and self._must_renew(role, published, valid, delegator):
            staged = self._repository.stage(role, lambda _: None)
        if staged is None:
            return valid
        self._add_signatures(staged, delegator)
        staged = self._repository.write_staged(role, staged.metadata)
        if _is_complete(staged, delegator):
            return staged
        self.waiting[role] = _word_missing(staged, delegator)
        return valid

    def _must_renew(
        self, role: str, published: Signed | None, valid: Signed | None, delegator: Signed
    ) -> bool:
        if valid is None:
            return published is not None
        return self._can_renew(valid, delegator)

    def _make_snapshot(self, root: Signed, found: list[Signed]) -> Signed | None:
        published = self._repository.find_published(Snapshot.type)
        meta = {
            f"{item.role}.json": MetaFile.from_data(item.version, item.data, ["sha256"])
            for item in found
        }
        if published is not None:
            # No box accepts a snapshot that has forgotten a role.
            meta = {**published.metadata.signed.meta, **meta}
            is_same = published.metadata.signed.meta == meta
            if is_same and _is_complete(published, root) and not self._is_due(published):
                return published
        version = 1 if published is None else published.version + 1
        snapshot = Snapshot(version=version, expires=self._expire(Snapshot.type), meta=meta)
        return self._complete(Snapshot.type, Metadata(snapshot), root)

    def _make_timestamp(self, root: Signed, snapshot: Signed) -> Signed | None:
        published = self._repository.find_published(Timestamp.type)
        timestamp = Timestamp(
            version=1 if published is None else published.version + 1,
            expires=self._expire(Timestamp.type),
            snapshot_meta=MetaFile.from_data(snapshot.version, snapshot.data, ["sha256"]),
            unrecognized_fields={SIGNED_AT: self._now.astimezone(UTC).isoformat()},
        )
        return self._complete(Timestamp.type, Metadata(timestamp), root)

    def _complete(self, role: str, metadata: Metadata[Any], root: Signed) -> Signed | None:
        signed = Signed(role, metadata, b"")
        self._add_signatures(signed, root)
        if _is_complete(signed, root):
            return Signed(role, metadata, metadata.to_bytes())
        self.waiting[role] = _word_missing(signed, root)
        return None

    def _add_signatures(self, signed: Signed, *delegators: Signed) -> None:
        """Add the signatures of the keys at hand."""
        keyids = {keyid for item in delegators for keyid in _list_keyids(signed.role, item)}
        for keyid in sorted(keyids - set(signed.metadata.signatures)):
            signer = self._ring.find_signer(keyid)
            if signer is not None:
                signed.metadata.sign(signer, append=True)

    def _is_new(self, signed: Signed) -> bool:
        published = self._repository.find_published(signed.role)
        return published is None or published.version < signed.version

    def _can_renew(self, published: Signed, delegator: Signed) -> bool:
        """Say whether metadata is old enough to be signed anew, and the keys are at hand."""
        keyids = _list_keyids(published.role, delegator)
        at_hand = sum(self._ring.find_signer(keyid) is not None for keyid in keyids)
        role = delegator.metadata.signed.get_delegated_role(published.role)
        return at_hand >= role.threshold and self._is_due(published)

    def _is_due(self, published: Signed) -> bool:
        days = self._days.get(published.role, self._days[Targets.type])
        left: timedelta = published.metadata.signed.expires - self._now
        return left < timedelta(days=days) * (1 - _RENEW_AT)

    def _expire(self, role: str) -> datetime:
        return self._now.replace(microsecond=0) + timedelta(days=self._days[role])


def _list_keyids(role: str, delegator: Signed) -> Iterator[str]:
    yield from delegator.metadata.signed.get_delegated_role(role).keyids


def _is_complete(signed: Signed | None, delegator: Signed) -> bool:
    if signed is None:
        return False
    metadata = signed.metadata
    try:
        delegator.metadata.signed.verify_delegate(
            signed.role, metadata.signed_bytes, metadata.signatures
        )
    except UnsignedMetadataError:
        return False
    return True


def _word_missing(signed: Signed, delegator: Signed) -> str:
    result = delegator.metadata.signed.get_verification_result(
        signed.role, signed.metadata.signed_bytes, signed.metadata.signatures
    )
    keyids = ", ".join(sorted(keyid[:12] for keyid in result.unsigned))
    return f"lacks {result.missing} signature(s); keys that may give them: {keyids}"
