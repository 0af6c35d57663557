"""Results that are expensive to make and wanted by many."""

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Hashable
from concurrent.futures import Executor
from typing import Generic, TypeVar

_K = TypeVar("_K", bound=Hashable)
_T = TypeVar("_T")


class Once(Generic[_K, _T]):
    """Results of blocking work by key: made once however many ask, the least recently used dropped.

    Belongs to one event loop.
    """

    def __init__(self, capacity: int, pool: Executor | None = None) -> None:
        """``capacity`` results are kept. ``pool``: where the work is done; the event loop's own threads when absent."""
        self._capacity = capacity
        self._pool = pool
        self._made: OrderedDict[_K, asyncio.Future[_T]] = OrderedDict()

    async def get(self, key: _K, make: Callable[[], _T]) -> _T:
        """What ``make`` returns, or returned before; what it raises, and then the next call tries again."""
        made = self._made.get(key)
        if made is None or (made.done() and (made.cancelled() or made.exception() is not None)):
            made = self._made[key] = asyncio.get_running_loop().run_in_executor(self._pool, make)
        self._made.move_to_end(key)
        while len(self._made) > self._capacity:
            self._made.popitem(last=False)
        # A client that leaves must not cancel the work for the others.
        return await asyncio.shield(made)
