"""A thread for the text of one version, so that a tokenizer or template that hangs does not block the others."""

import asyncio
import ctypes
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from deltazip_ray.errors import RequestTimeout

_TIMEOUT_S = 10.0

_T = TypeVar("_T")


class OwnThread:
    """Runs calls one after the other, and interrupts one that takes too long. Belongs to one event loop.

    Calls that hang outside Python bytecode cannot be interrupted; then only this thread is lost.
    """

    def __init__(self, timeout_s: float = _TIMEOUT_S) -> None:
        self._timeout_s = timeout_s
        self._pool = _new_pool()
        self._working = 0
        self._late: Future[Any] | None = None

    async def run(self, work: Callable[[], _T]) -> _T:
        """The result of ``work``, or its exception; RequestTimeout if it, or a call before it, takes too long.

        Cancellation drops work that has not started; running work is still interrupted if it takes too long.
        """
        if self._late is not None and not self._late.done():
            raise self._timeout()
        future = self._pool.submit(self._work, work)
        watched = asyncio.ensure_future(self._watched(future))
        try:
            return await asyncio.shield(watched)
        except asyncio.CancelledError:
            future.cancel()
            watched.add_done_callback(_ignore)
            raise

    async def _watched(self, future: Future[_T]) -> _T:
        try:
            async with asyncio.timeout(self._timeout_s):
                return await asyncio.wrap_future(future)
        except TimeoutError:
            if future.running():
                self._give_up(future)
            raise self._timeout() from None

    def _work(self, work: Callable[[], _T]) -> _T:
        self._working = threading.get_ident()
        return work()

    def _give_up(self, future: Future[Any]) -> None:
        """Interrupt work that takes too long: an endless loop in a template would compete for the GIL forever."""
        self._late = future
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(self._working), ctypes.py_object(TimeoutError))
        # The exception may hit the pool's own code and end its thread, so use a new pool.
        self._pool.shutdown(wait=False)
        self._pool = _new_pool()

    def _timeout(self) -> RequestTimeout:
        return RequestTimeout(
            f"this model's chat template or tokenizer took longer than {self._timeout_s:g} s: "
            "send a shorter prompt; if that does not help, the variant must be published again"
        )


def _ignore(watched: asyncio.Future[Any]) -> None:
    """Nobody waits for it any more; asyncio logs exceptions that nobody has looked at."""
    if not watched.cancelled():
        watched.exception()


def _new_pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, thread_name_prefix="deltazip-text")
