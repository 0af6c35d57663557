"""Waiting in tests, with an end."""

import asyncio
from collections.abc import Callable


async def until(reached: Callable[[], object], within_s: float = 20.0) -> None:
    """Wait until a condition holds, or fail."""
    async with asyncio.timeout(within_s):
        while not reached():  # noqa: ASYNC110
            await asyncio.sleep(0.001)
