"""Where a request's first token will come soonest: a pure prediction in seconds, no Ray in sight."""

import hashlib
from collections import Counter
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, replace
from typing import TypeVar


@dataclass(frozen=True)
class ReplicaView:
    """What a router knows about one replica, partly from its reports and partly from its own assignments."""

    device: frozenset[str] = frozenset()
    """Versions in a slot."""
    loading: frozenset[str] = frozenset()
    """Versions on their way into a slot, or assigned here a moment ago."""
    host: frozenset[str] = frozenset()
    """Versions in the host memory of the replica's node."""
    slots: int = 1
    ongoing: int = 0
    """Requests that run or wait there."""
    capacity: int = 1
    """Requests that fit into one batch."""


@dataclass(frozen=True)
class Costs:
    """Seconds. Differences matter, not absolute values; the defaults hold for deltas of around a gigabyte."""

    share: float = 0.02
    """What each request already in the batch adds to the first token of another."""
    wait: float = 0.5
    """What each request in front of the batch adds."""
    from_host: float = 0.1
    from_remote: float = 2.0
    evict: float = 0.2
    """Pushing another version off the device, which somebody may want back."""


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
    """Predicted seconds to the first token: the queue ahead, and the delta's way to the device (None: the base)."""
    batch = min(view.ongoing, view.capacity)
    queue = costs.share * batch + costs.wait * (view.ongoing - batch)
    return queue + (0.0 if version is None else time_to_ready(view, version, costs))


_Key = TypeVar("_Key", bound=Hashable)


class Heat:
    """Requests under way by version: says when one has become so much hotter that a hint may be worth while."""

    def __init__(self) -> None:
        self._ongoing: Counter[str] = Counter()
        self._hinted: dict[str, int] = {}

    def began(self, version: str) -> bool:
        """One more; True when that makes 4, 8, 16 and so on for the first time since the version was cold."""
        self._ongoing[version] += 1
        count = self._ongoing[version]
        if count < _HOT or count < 2 * self._hinted.get(version, 0):
            return False
        self._hinted[version] = count
        return True

    def ended(self, version: str) -> None:
        """One less."""
        self._ongoing[version] -= 1
        if not self._ongoing[version]:
            del self._ongoing[version]
            self._hinted.pop(version, None)


_HOT = 4
"""Requests of one version at once, from which on it may be wanted on another replica too."""


def spill_target(views: Mapping[_Key, ReplicaView], version: str, costs: Costs) -> _Key | None:
    """Where a version would go if its replica had twice as much to do, and is not yet: there it should be fetched now.

    None: nowhere. ``views`` must not be empty.
    """
    home = choose(views, version, costs)
    busier = replace(views[home], ongoing=2 * views[home].ongoing)
    target = choose({**views, home: busier}, version, costs)
    return None if target == home or version in views[target].device | views[target].loading else target


def choose(views: Mapping[_Key, ReplicaView], version: str | None, costs: Costs) -> _Key:
    """The cheapest replica. Ties go by a hash of version and replica, so that all routers agree and versions spread.

    ``views`` must not be empty.
    """
    return min(views, key=lambda key: (round(cost(views[key], version, costs), 6), _rank(version, key)))


def _rank(version: str | None, key: Hashable) -> bytes:
    return hashlib.blake2b(f"{version}|{key}".encode(), digest_size=8).digest()
