"""A cache for each test, and no error that nobody hears of."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.support.host_bench import Bench


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    made = Bench(tmp_path)
    yield made
    made.store.gate.set()
    await made.cache.close()
    made.cache.check()


@pytest.fixture(autouse=True)
async def no_error_in_a_callback() -> AsyncIterator[None]:
    problems: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: problems.append(context))
    yield
    assert problems == []
