"""A thread for the text of one version, so that what hangs there holds up nobody else."""

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
    """Runs one piece of work after the other, and interrupts one that takes too long. Belongs to one event loop.

    Work that hangs outside of Python's bytecode cannot be interrupted: then this thread is lost, and only this one.
    """

    def __init__(self, timeout_s: float = _TIMEOUT_S) -> None:
        self._timeout_s = timeout_s
        self._pool = _new_pool()
        self._working = 0
        self._late: Future[Any] | None = None

    async def run(self, work: Callable[[], _T]) -> _T:
        """What ``work`` returns or raises; RequestTimeout when it takes too long, and at once while it still does.

        Who is cancelled takes work along that has not begun; other work is watched to its end all the same.
        """
        if self._late is not None and not self._late.done():
            raise self._timeout()
        future = self._pool.submit(self._work, work)
        try:
            return await asyncio.shield(asyncio.ensure_future(self._watched(future)))
        except asyncio.CancelledError:
            future.cancel()
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
        """A template's endless loop would keep the interpreter from everybody else for ever."""
        self._late = future
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(self._working), ctypes.py_object(TimeoutError))
        # The interruption may hit the old pool's own code, which ends its thread.
        self._pool.shutdown(wait=False)
        self._pool = _new_pool()

    def _timeout(self) -> RequestTimeout:
        return RequestTimeout(
            f"this model's chat template or tokenizer was not done after {self._timeout_s:g} s: "
            "send a shorter prompt; if that does not help, the variant must be published anew"
        )


def _new_pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, thread_name_prefix="deltazip-text")
