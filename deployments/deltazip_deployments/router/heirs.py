"""Aliases that have moved in the store, and stay with the version before until the new one is there."""

import asyncio
import contextvars
import time
from collections.abc import Awaitable, Callable, Mapping

from deltazip_ray.artifact.catalog import Variant

Bring = Callable[[str], Awaitable[object]]
"""Has a version brought to a replica; ends when it is there, or will not be. Raises nothing."""

_IN_USE_S = 60.0
"""After the last request a version needs no heir that is warm: its own requests would have been cold as well."""


class Heirs:
    """A version that is in use is replaced when its heir can answer at once. Belongs to one event loop."""

    def __init__(
        self, bring: Bring, wait_s: float, changed: Callable[[], None], clock: Callable[[], float] = time.monotonic
    ) -> None:
        """``wait_s``: an alias is not held back for longer. ``changed`` is called when one need not be any more."""
        self._bring = bring
        self._wait_s = wait_s
        self._changed = changed
        self._clock = clock
        self._asked: dict[str, float] = {}
        self._coming: dict[str, asyncio.Task[None]] = {}

    def asked(self, version: str) -> None:
        """Somebody uses a version."""
        self._asked[version] = self._clock()

    def held_back(self, before: Mapping[str, Variant], now: Mapping[str, Variant]) -> dict[str, Variant]:
        """Variants as clients should see them: as they are ``now``, but for aliases whose version is on its way.

        ``before``: what was returned the last time.
        """
        since = self._clock() - _IN_USE_S
        self._asked = {version: at for version, at in self._asked.items() if at >= since}
        waited = set[str]()
        shown = {name: self._shown(before.get(name), variant, waited) for name, variant in now.items()}
        self._coming = {heir: task for heir, task in self._coming.items() if heir in waited or not task.done()}
        return shown

    def close(self) -> None:
        """Wait for nobody any more."""
        for task in self._coming.values():
            task.cancel()

    def _shown(self, before: Variant | None, variant: Variant, waited: set[str]) -> Variant:
        """One variant; adds to ``waited`` the versions that it waits for."""
        if before is None or before.aliases == variant.aliases:
            return variant
        kept = {}
        for alias, heir in variant.aliases.items():
            old = before.aliases.get(alias)
            if old not in (None, heir) and old in self._asked and old in variant.versions and self._wait_s:
                waited.add(heir)
                if self._is_coming(heir):
                    kept[alias] = old
        return variant.model_copy(update={"aliases": variant.aliases | kept})

    def _is_coming(self, heir: str) -> bool:
        """Whether a version is on its way, on which it is sent if it is not."""
        if heir not in self._coming:
            # In a context of its own: Serve knows calls by the HTTP request that they are made for.
            self._coming[heir] = asyncio.create_task(self._come(heir), context=contextvars.Context())
        return not self._coming[heir].done()

    async def _come(self, heir: str) -> None:
        try:
            async with asyncio.timeout(self._wait_s):
                await self._bring(heir)
        except TimeoutError:
            pass
        finally:
            asyncio.get_running_loop().call_soon(self._changed)
