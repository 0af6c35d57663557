"""The versions that replicas hold in the node store, and which replicas are silent. The caller supplies the time."""

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
        """All replicas with a lease."""
        return frozenset(self._seen)

    def touch(self, replica: str, now: float) -> None:
        """Renew a replica's lease."""
        self._seen[replica] = now

    def add(self, replica: str, version: str) -> None:
        """Add one hold on ``version``."""
        self._held.setdefault(replica, Counter())[version] += 1

    def remove(self, replica: str, version: str) -> bool:
        """Remove one hold; False if the replica has none, for example because it was dropped."""
        held = self._held.get(replica, Counter())
        if not held[version]:
            return False
        held[version] -= 1
        return True

    def drop(self, replica: str) -> list[str]:
        """Forget a replica; returns the versions to release, each as often as it was held."""
        self._seen.pop(replica, None)
        return list(self._held.pop(replica, Counter()).elements())

    def silent(self, now: float) -> list[str]:
        """Replicas that were silent for longer than the timeout."""
        return [replica for replica, seen in self._seen.items() if now - seen > self._timeout_s]

    def alone_s(self, now: float) -> float:
        """Seconds since there was any replica."""
        if self._seen:
            self._last_alone = now
        return now - self._last_alone
