"""A replica's client of the node store: a DeltaSource that maps the store's memory read-only."""

import asyncio
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from ray.exceptions import ActorUnavailableError, RayActorError, RayTaskError

from deltazip_deployments.node_store.arena import ArenaRef, map_arena
from deltazip_deployments.ray_errors import unwrapped
from deltazip_ray.errors import StoreUnavailable
from deltazip_ray.residency.tiers import HostDelta, HostMemory

_ATTEMPTS = 5
_PAUSE_S = 0.2
_PATIENCE_S = 15.0
"""Time for a new node store to come up: it finds no room for its arena before all replicas of the host have noticed
that its predecessor is dead and have unmapped that one's memory."""
_UNKNOWN_S = 1.0
"""Assumed time of a fetch before there was one."""
_FETCHES = 8
"""Number of fetches that the average time covers, roughly."""

_Answer = TypeVar("_Answer")


@dataclass(frozen=True, eq=False)
class _Link:
    """One life of the node store: its actor and its memory."""

    actor: Any
    ref: ArenaRef
    arena: HostMemory


class NodeStoreClient:
    """Survives the store's death: the next call finds or starts another one and maps its memory.

    Earlier views stay valid, as they keep their memory mapped.
    """

    def __init__(self, replica: str, find: Callable[[], Any]) -> None:
        """``find`` returns the actor's handle, and starts the actor if there is none; it may block."""
        self._replica = replica
        self._find = find
        self._link: _Link | None = None
        self._last: _Link | None = None
        """The last ``_link``, even if it was lost: a store that was only unreachable still has our holds."""
        self._connecting = asyncio.Lock()
        self._held: defaultdict[str, list[_Link]] = defaultdict(list)
        self._on_host: frozenset[str] = frozenset()
        self._fetch_s = _UNKNOWN_S

    async def acquire(self, version: str) -> HostDelta:
        """See DeltaSource; also raises StoreUnavailable when no node store can be reached."""
        # A cancelled caller must not leave a hold behind: the call is finished, and its hold released.
        call = asyncio.create_task(self._acquire(version))
        try:
            return await asyncio.shield(call)
        except asyncio.CancelledError:
            call.add_done_callback(lambda _: None if call.cancelled() or call.exception() else self._give_back(version))
            raise

    async def release(self, version: str) -> None:
        """Undo one acquire. Raises StoreUnavailable if the store had dropped the hold before.

        Then the bytes may have been overwritten, and what was read from them must not be used.
        """
        link = self._oldest_hold(version)
        if link is self._last and not await self._released(link, version):
            raise StoreUnavailable(f"the node store dropped its lease on version {version[:12]}: load it again")

    async def prefetch(self, version: str) -> bool:
        """See DeltaSource."""
        try:
            there, _ = await self._call(lambda link: link.actor.prefetch.remote(version))
        except StoreUnavailable:
            return False
        return bool(there)

    async def discard(self, version: str, *, disk: bool = False) -> None:
        """See DeltaSource; raises what the store raises, and StoreUnavailable."""
        await self._call(lambda link: link.actor.discard.remote(version, disk))

    def seconds_away(self, version: str) -> float:
        """See DeltaSource: as of the last heartbeat."""
        return 0.0 if version in self._on_host else self._fetch_s

    async def retired(self) -> frozenset[str]:
        """Versions that this replica should drop; each is returned once."""
        versions: frozenset[str]
        versions, _ = await self._call(lambda link: link.actor.retired.remote(self._replica))
        return versions

    async def connect(self) -> HostMemory:
        """Find or start the node store; returns its memory. Raises StoreUnavailable."""
        _, link = await self._call(lambda link: link.actor.heartbeat.remote(self._replica, ""))
        return link.arena

    async def heartbeat(self, metrics: str) -> frozenset[str]:
        """Send a heartbeat with the replica's metrics; returns the versions in the host's memory."""
        self._on_host, _ = await self._call(lambda link: link.actor.heartbeat.remote(self._replica, metrics))
        return self._on_host

    async def leave(self) -> None:
        """Tell the store that this replica is gone."""
        if self._link is not None:
            try:
                await self._link.actor.leave.remote(self._replica)
            except RayActorError:
                return

    async def _acquire(self, version: str) -> HostDelta:
        began = time.monotonic()
        stored, link = await self._call(lambda link: link.actor.acquire.remote(self._replica, version))
        if stored.tier != "host":
            self._fetch_s += (time.monotonic() - began - self._fetch_s) / _FETCHES
        self._held[version].append(link)
        views = {block: link.arena.view[offset : offset + size] for block, (offset, size) in stored.blobs.items()}
        return HostDelta(stored.manifest, views, stored.tier, link.arena)

    async def _released(self, link: _Link, version: str) -> bool:
        """Release a hold, and return whether the store still had it. True if the store is dead: nobody wrote then.

        Raises StoreUnavailable when the store stays unreachable.
        """
        for attempt in range(_ATTEMPTS):
            await asyncio.sleep(_PAUSE_S * attempt)
            try:
                kept: bool = await _result(link.actor.release.remote(self._replica, version))
            except ActorUnavailableError:
                continue
            except RayActorError:
                return True
            return kept
        raise StoreUnavailable("the node store of this host cannot be reached: load the version again")

    def _oldest_hold(self, version: str) -> _Link:
        """The oldest hold, to release first: holds on a store that died are not needed, as nobody writes there."""
        return self._held[version].pop(0)

    def _give_back(self, version: str) -> None:
        link = self._oldest_hold(version)
        link.actor.release.remote(self._replica, version)

    async def _call(self, ask: Callable[[_Link], Awaitable[_Answer]]) -> tuple[_Answer, _Link]:
        """Call the store, or its successor if it dies meanwhile; also returns the link that answered.

        Raises StoreUnavailable, and what the store raises.
        """
        gives_up = time.monotonic() + _PATIENCE_S
        while True:
            link: _Link | None = None
            try:
                link = await self._connect()
                return await _result(ask(link)), link
            except (RayActorError, StoreUnavailable) as error:
                if isinstance(error, StoreUnavailable) and link is not None:
                    raise
                self._lost(link, dead=not isinstance(error, ActorUnavailableError | StoreUnavailable))
                if time.monotonic() > gives_up:
                    raise StoreUnavailable(f"the node store of this host does not stay up: {_reason(error)}") from error
            del link  # unmaps a dead store's memory, which its successor may wait for
            await asyncio.sleep(_PAUSE_S)

    def _lost(self, link: _Link | None, *, dead: bool) -> None:
        """Forget a lost link; that of a dead store completely, so that its memory is freed for the successor."""
        if self._link is link:
            self._link = None
            if dead:
                self._last = None

    async def _connect(self) -> _Link:
        async with self._connecting:
            if self._link is None:
                actor = await asyncio.to_thread(self._find)
                ref: ArenaRef = await actor.arena.remote()
                if self._last is None or self._last.ref != ref:
                    self._last = _Link(actor, ref, HostMemory(map_arena(ref)))
                self._link = self._last
            return self._link


def _reason(error: Exception) -> str:
    """One line of Ray's message about a dead actor: the last one if the constructor failed, otherwise the first."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[-1 if "creation task" in lines[0] else 0]


async def _result(answer: Awaitable[_Answer]) -> _Answer:
    try:
        return await answer
    except RayTaskError as error:
        raise unwrapped(error) from error
