"""What the slot table keeps books of: versions on their way, versions in slots, and pins."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from deltazip_ray.residency.tiers import Tier

AskSlot = Callable[[], Awaitable[int]]
"""Waits for a slot, which is the load's until it ends."""

Load = Callable[[AskSlot], Awaitable[Tier]]
"""Has a version's bytes ready, then asks for a slot, once, fills it and tells where the bytes came from. It must not
return or raise, not even CancelledError, while anything may still write to the slot: the slot is given to another
version right after."""


@dataclass(frozen=True, eq=False, slots=True)
class Pin:
    """The right to use ``version`` in ``slot`` until it is given back by ``unpin``."""

    version: str
    slot: int
    tier: Tier
    """Where the delta was when it was asked for; ``device`` is warm."""


Waiters = dict[asyncio.Future[Pin], None]
"""An ordered set: who waits for one version."""


@dataclass(eq=False)
class Coming:
    """A version on its way that has no slot yet."""

    version: str
    waiters: Waiters
    load: asyncio.Future[Tier] | None = None
    """None only until it has been started."""
    place: asyncio.Future[int] | None = None
    """What the load waits for once it has asked for a slot."""
    due: int = 0
    """In the queue: it is overdue when the table's count of overtakes has come to this."""
    occupant: "Occupant | None" = None
    """What it became when it got a slot."""


@dataclass(eq=False)
class Occupant:
    """A version in a slot."""

    version: str
    slot: int
    waiters: Waiters
    """Those who get a pin when the load is done; empty when resident."""
    load: asyncio.Future[Tier] | None = None
    """None when resident."""
    pins: int = 0
    closed: bool = False
    """Whether it takes no new pins, so that it drains."""
    leaving: bool = False
    """Whether its slot becomes free when the last pin is given back."""


def fail(waiters: Waiters, error: BaseException) -> None:
    """Tell all waiters, who are none any more."""
    for waiter in waiters:
        waiter.set_exception(error)
    waiters.clear()


def cancel(load: asyncio.Future[Tier] | None) -> None:
    """Tell a load to stop, if there is one."""
    if load is not None:
        load.cancel()
