"""Waiting in tests, with an end."""

import asyncio
import time
from collections.abc import Awaitable, Callable


async def until(reached: Callable[[], object], within_s: float = 20.0) -> None:
    """Wait until a condition holds, or fail."""
    async with asyncio.timeout(within_s):
        while not reached():  # noqa: ASYNC110
            await asyncio.sleep(0.001)


async def longest_hold(work: Awaitable[object]) -> tuple[float, float]:
    """For how long at most something else could not run while ``work`` was done, and how long it took; seconds."""
    longest = 0.0

    async def watch() -> None:
        nonlocal longest
        before = time.perf_counter()
        while True:
            await asyncio.sleep(0)
            longest, before = max(longest, time.perf_counter() - before), time.perf_counter()

    watching = asyncio.create_task(watch())
    began = time.perf_counter()
    await work
    took = time.perf_counter() - began
    watching.cancel()
    return longest, took
