"""Loaded tokenizers, the least recently used of them dropped."""

import asyncio
from collections import OrderedDict
from collections.abc import Callable

from deltazip_deployments.text.version_text import VersionText


class TextCache:
    """Version (None: the base) to its :class:`VersionText`. Each is loaded once, in a thread, however many ask."""

    def __init__(self, load: Callable[[str | None], VersionText], capacity: int = 64) -> None:
        self._load = load
        self._capacity = capacity
        self._texts: OrderedDict[str | None, asyncio.Task[VersionText]] = OrderedDict()

    async def get(self, version: str | None) -> VersionText:
        """The version's text; whatever ``load`` raises, and then the next call tries again."""
        task = self._texts.get(version)
        if task is None or (task.done() and (task.cancelled() or task.exception() is not None)):
            task = self._texts[version] = asyncio.create_task(asyncio.to_thread(self._load, version))
        self._texts.move_to_end(version)
        while len(self._texts) > self._capacity:
            self._texts.popitem(last=False)
        # A client that leaves must not cancel the load for the others.
        return await asyncio.shield(task)
