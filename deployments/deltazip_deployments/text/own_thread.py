"""A thread for the text of one version, so that what hangs there holds up nobody else."""

import asyncio
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from deltazip_ray.errors import RequestTimeout

_TIMEOUT_S = 10.0

_T = TypeVar("_T")


class OwnThread:
    """Runs one piece of work after the other. Python cannot end a thread: one that hangs is lost, but it is the only
    one that its version can lose. Belongs to one event loop.
    """

    def __init__(self, timeout_s: float = _TIMEOUT_S) -> None:
        self._timeout_s = timeout_s
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="deltazip-text")
        self._late: Future[Any] | None = None

    async def run(self, work: Callable[[], _T]) -> _T:
        """What ``work`` returns or raises; RequestTimeout when it takes too long, and at once while it still does."""
        if self._late is not None and not self._late.done():
            raise self._timeout()
        future = self._pool.submit(work)
        try:
            async with asyncio.timeout(self._timeout_s):
                return await asyncio.wrap_future(future)
        except TimeoutError:
            if future.running():
                self._late = future
            raise self._timeout() from None

    def _timeout(self) -> RequestTimeout:
        return RequestTimeout(
            f"this model's chat template or tokenizer was not done after {self._timeout_s:g} s: "
            "send a shorter prompt; if that does not help, the variant must be published anew"
        )
