"""The entries of the slot table: versions being loaded, versions in slots, and pins."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from deltazip_ray.residency.tiers import Tier

AskSlot = Callable[[], Awaitable[int]]
"""Waits for a slot, which belongs to the load until the load ends."""

Load = Callable[[AskSlot], Awaitable[Tier]]
"""Fetches a version's bytes, then asks for a slot (once), fills it and returns the tier that the bytes came from. It
must not return or raise, not even CancelledError, while anything may still write to the slot: right after, the slot is
given to another version."""


@dataclass(frozen=True, eq=False, slots=True)
class Pin:
    """The right to use ``version`` in ``slot`` until ``unpin``."""

    version: str
    slot: int
    tier: Tier
    """Where the delta was at the time of the request; ``device`` is warm."""


Waiters = dict[asyncio.Future[Pin], None]
"""An ordered set of those waiting for one version."""


@dataclass(eq=False)
class Coming:
    """A version that is being loaded and has no slot yet."""

    version: str
    waiters: Waiters
    load: asyncio.Future[Tier] | None = None
    """None only until it is started."""
    place: asyncio.Future[int] | None = None
    """Will give the load its slot, once it has asked for one."""
    due: int = 0
    """While queued: it is overdue when the queue's count of overtakes reaches this."""
    occupant: "Occupant | None" = None
    """Its entry once it has a slot."""


@dataclass(eq=False)
class Occupant:
    """A version in a slot."""

    version: str
    slot: int
    waiters: Waiters
    """They get a pin when the load is done; empty when resident."""
    load: asyncio.Future[Tier] | None = None
    """None when resident."""
    pins: int = 0
    closed: bool = False
    """Whether it accepts no new pins, so that it drains."""
    leaving: bool = False
    """Whether to free its slot at the last unpin."""


def fail(waiters: Waiters, error: BaseException) -> None:
    """Fail all waiters and forget them."""
    for waiter in waiters:
        waiter.set_exception(error)
    waiters.clear()


def cancel(load: asyncio.Future[Tier] | None) -> None:
    """Cancel a load, if there is one."""
    if load is not None:
        load.cancel()
