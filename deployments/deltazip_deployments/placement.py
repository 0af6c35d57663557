"""Predicts on which replica a request gets its first token soonest. Pure functions, without Ray."""

import hashlib
from collections import Counter
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, replace
from typing import TypeVar


@dataclass(frozen=True)
class ReplicaView:
    """A router's view of one replica, from the replica's reports and the router's own assignments."""

    device: frozenset[str] = frozenset()
    """Versions in a slot."""
    loading: frozenset[str] = frozenset()
    """Versions being loaded into a slot, or assigned here a moment ago."""
    host: frozenset[str] = frozenset()
    """Versions in the host memory of the replica's node."""
    slots: int = 1
    ongoing: int = 0
    """Running and waiting requests."""
    capacity: int = 1
    """Maximum requests in one batch."""


@dataclass(frozen=True)
class Costs:
    """In seconds. Only differences matter; the defaults are for deltas of about a gigabyte."""

    share: float = 0.02
    """Delay of a first token by each request in the batch."""
    wait: float = 0.5
    """Delay by each request waiting for the batch."""
    from_host: float = 0.1
    from_remote: float = 2.0
    evict: float = 0.2
    """Cost of evicting another version, which may be needed again."""


def time_to_ready(view: ReplicaView, version: str, costs: Costs) -> float:
    """Seconds until ``version`` is on the replica's device."""
    if version in view.device:
        return 0.0
    load = costs.from_host if version in view.host else costs.from_remote
    if version in view.loading:
        return load / 2
    full = len(view.device | view.loading) >= view.slots
    return load + (costs.evict if full else 0.0)


def cost(view: ReplicaView, version: str | None, costs: Costs) -> float:
    """Predicted seconds to the first token: the queue, plus loading the delta (``version`` None: the base)."""
    batch = min(view.ongoing, view.capacity)
    queue = costs.share * batch + costs.wait * (view.ongoing - batch)
    return queue + (0.0 if version is None else time_to_ready(view, version, costs))


_Key = TypeVar("_Key", bound=Hashable)


class Heat:
    """Counts running requests by version, to notice when one becomes hot enough for a prefetch elsewhere."""

    def __init__(self) -> None:
        self._ongoing: Counter[str] = Counter()
        self._hinted: dict[str, int] = {}

    def began(self, version: str) -> bool:
        """Count a new request; True when it is the 4th, 8th, 16th, … for the first time since the version was cold."""
        self._ongoing[version] += 1
        count = self._ongoing[version]
        if count < _HOT or count < 2 * self._hinted.get(version, 0):
            return False
        self._hinted[version] = count
        return True

    def ended(self, version: str) -> None:
        """Count the end of a request."""
        self._ongoing[version] -= 1
        if not self._ongoing[version]:
            del self._ongoing[version]
            self._hinted.pop(version, None)


_HOT = 4
"""Concurrent requests of one version from which on another replica may need it too."""


def spill_target(views: Mapping[_Key, ReplicaView], version: str, costs: Costs) -> _Key | None:
    """The replica to prefetch a version to: where requests would go if its current replica had twice as many.

    None if that replica has it already, or is the same one. ``views`` must not be empty.
    """
    home = choose(views, version, costs)
    busier = replace(views[home], ongoing=2 * views[home].ongoing)
    target = choose({**views, home: busier}, version, costs)
    return None if target == home or version in views[target].device | views[target].loading else target


def choose(views: Mapping[_Key, ReplicaView], version: str | None, costs: Costs) -> _Key:
    """The cheapest replica. A hash of version and replica breaks ties, so that all routers agree and versions spread.

    ``views`` must not be empty.
    """
    return min(views, key=lambda key: (round(cost(views[key], version, costs), 6), _rank(version, key)))


def _rank(version: str | None, key: Hashable) -> bytes:
    return hashlib.blake2b(f"{version}|{key}".encode(), digest_size=8).digest()
