"""A cache of results that are expensive to compute and wanted by many callers at once."""

import asyncio
import math
from collections import OrderedDict
from collections.abc import Callable, Hashable
from concurrent.futures import Executor
from typing import Generic, TypeVar

from deltazip_ray.errors import Overloaded

_K = TypeVar("_K", bound=Hashable)
_T = TypeVar("_T")


class Once(Generic[_K, _T]):
    """An LRU cache of the results of blocking work. Concurrent callers for one key share one computation.

    Belongs to one event loop.
    """

    def __init__(self, capacity: int, pool: Executor | None = None, most_pending: float = math.inf) -> None:
        """Keep ``capacity`` results. ``pool`` does the work; default: the event loop's own threads.

        ``most_pending``: limit of computations that are queued or running.
        """
        self._capacity = capacity
        self._pool = pool
        self._most_pending = most_pending
        self._pending = 0
        self._made: OrderedDict[_K, asyncio.Future[_T]] = OrderedDict()

    async def get(self, key: _K, make: Callable[[], _T]) -> _T:
        """The result of ``make``, now or earlier. Raises what it raises, and then the next call tries again.

        Raises Overloaded when ``most_pending`` is reached.
        """
        made = self._made.get(key)
        if made is None or (made.done() and (made.cancelled() or made.exception() is not None)):
            if self._pending >= self._most_pending:
                raise Overloaded(f"{self._pending} others wait for work of this kind: try again later")
            made = self._made[key] = asyncio.get_running_loop().run_in_executor(self._pool, make)
            self._pending += 1
            made.add_done_callback(self._done)
        self._made.move_to_end(key)
        while len(self._made) > self._capacity:
            self._made.popitem(last=False)
        # A client that leaves must not cancel the work for the others.
        return await asyncio.shield(made)

    def _done(self, made: asyncio.Future[_T]) -> None:
        self._pending -= 1
