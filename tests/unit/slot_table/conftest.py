"""A table of two slots for each test, its books checked at the end."""

from collections.abc import AsyncIterator

import pytest

from tests.support.slot_bench import Bench


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    made = Bench(slots=2)
    yield made
    await made.table.close()
    made.table.check()
