"""Where a request's first token will come soonest: a pure prediction in seconds, no Ray in sight."""

import hashlib
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
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


def choose(views: Mapping[_Key, ReplicaView], version: str | None, costs: Costs) -> _Key:
    """The cheapest replica. Ties go by a hash of version and replica, so that all routers agree and versions spread.

    ``views`` must not be empty.
    """
    return min(views, key=lambda key: (round(cost(views[key], version, costs), 6), _rank(version, key)))


def _rank(version: str | None, key: Hashable) -> bytes:
    return hashlib.blake2b(f"{version}|{key}".encode(), digest_size=8).digest()
