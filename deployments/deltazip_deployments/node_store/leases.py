"""Who holds which versions in the node store, and who has gone silent. Pure bookkeeping: the caller brings the time."""

from collections import Counter


class Leases:
    """Versions held by replicas. All times are seconds of one monotonic clock."""

    def __init__(self, timeout_s: float, now: float) -> None:
        self._timeout_s = timeout_s
        self._held: dict[str, Counter[str]] = {}
        self._seen: dict[str, float] = {}
        self._last_alone = now

    @property
    def replicas(self) -> frozenset[str]:
        """Replicas that are present."""
        return frozenset(self._seen)

    def touch(self, replica: str, now: float) -> None:
        """The replica has shown life."""
        self._seen[replica] = now

    def add(self, replica: str, version: str) -> None:
        """The replica holds ``version`` once more."""
        self._held.setdefault(replica, Counter())[version] += 1

    def remove(self, replica: str, version: str) -> bool:
        """Take one hold back; False when the replica has none, as after it was dropped for its silence."""
        held = self._held.get(replica, Counter())
        if not held[version]:
            return False
        held[version] -= 1
        return True

    def drop(self, replica: str) -> list[str]:
        """Forget the replica; returns the versions to release, each as often as it was held."""
        self._seen.pop(replica, None)
        return list(self._held.pop(replica, Counter()).elements())

    def silent(self, now: float) -> list[str]:
        """Replicas that have shown no life for the timeout."""
        return [replica for replica, seen in self._seen.items() if now - seen > self._timeout_s]

    def alone_s(self, now: float) -> float:
        """Seconds without any replica."""
        if self._seen:
            self._last_alone = now
        return now - self._last_alone
