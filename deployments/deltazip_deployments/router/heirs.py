"""Delays the move of an alias until its new version is loaded."""

import asyncio
import contextvars
import time
from collections.abc import Awaitable, Callable, Mapping

from deltazip_ray.artifact.catalog import Variant

Bring = Callable[[str], Awaitable[object]]
"""Fetches a version to a replica; returns when it is there or has failed. Raises nothing."""

_IN_USE_S = 60.0
"""A version without requests for this time is replaced at once: its own requests would have been cold, too."""


class Heirs:
    """Replaces a version in use only when the new one, its heir, can answer at once. Belongs to one event loop."""

    def __init__(
        self, bring: Bring, wait_s: float, changed: Callable[[], None], clock: Callable[[], float] = time.monotonic
    ) -> None:
        """``wait_s``: the longest delay. ``changed`` is called when an alias can move."""
        self._bring = bring
        self._wait_s = wait_s
        self._changed = changed
        self._clock = clock
        self._asked: dict[str, float] = {}
        self._coming: dict[str, asyncio.Task[None]] = {}

    def asked(self, version: str) -> None:
        """Note a request for a version."""
        self._asked[version] = self._clock()

    def held_back(self, before: Mapping[str, Variant], now: Mapping[str, Variant]) -> dict[str, Variant]:
        """The variants as clients should see them: ``now``, except for aliases whose new version is being fetched.

        ``before``: the result of the last call.
        """
        since = self._clock() - _IN_USE_S
        self._asked = {version: at for version, at in self._asked.items() if at >= since}
        waited = set[str]()
        shown = {name: self._shown(before.get(name), variant, waited) for name, variant in now.items()}
        self._coming = {heir: task for heir, task in self._coming.items() if heir in waited or not task.done()}
        return shown

    def close(self) -> None:
        """Stop waiting for versions."""
        for task in self._coming.values():
            task.cancel()

    def _shown(self, before: Variant | None, variant: Variant, waited: set[str]) -> Variant:
        """One variant; adds the versions that it waits for to ``waited``."""
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
        """Whether a version is still being fetched; starts the fetch if there is none."""
        if heir not in self._coming:
            # In a context of its own, as Serve attributes calls to the HTTP request of their context.
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
