"""Results that are made once however many ask."""

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest

from deltazip_ray.errors import Overloaded
from deltazip_ray.once import Once


async def test_one_result_for_all_who_ask_also_when_the_first_leaves() -> None:
    go_on, made = threading.Event(), list[str]()

    def make() -> int:
        made.append("one")
        go_on.wait(10)
        return 7

    once = Once[str, int](4)
    first, second = (asyncio.create_task(once.get("one", make)) for _ in range(2))
    await asyncio.sleep(0)
    first.cancel()
    go_on.set()
    assert await second == 7
    assert await once.get("one", make) == 7
    assert made == ["one"]


async def test_what_fails_is_tried_again_and_the_least_recently_used_is_forgotten() -> None:
    once, made = Once[str, int](2), list[str]()

    def make(key: str) -> int:
        made.append(key)
        return {"a": 1, "b": 2, "c": 3}[key]

    for _ in range(2):
        with pytest.raises(KeyError):
            await once.get("?", lambda: make("?"))
    for key in ("a", "b", "a", "c", "a", "b"):
        await once.get(key, partial(make, key))
    assert made == ["?", "?", "a", "b", "c", "b"]


async def test_work_does_not_pile_up() -> None:
    """Who asks for it may be gone long before it is done."""
    go_on = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        once = Once[int, bool](8, pool, most_pending=2)
        asked = [asyncio.create_task(once.get(i, go_on.wait)) for i in range(2)]
        await asyncio.sleep(0)
        with pytest.raises(Overloaded, match="2 others"):
            await once.get(2, go_on.wait)
        for one in asked:
            one.cancel()
        joined = asyncio.create_task(once.get(1, go_on.wait))
        await asyncio.sleep(0)
        with pytest.raises(Overloaded):
            await once.get(2, go_on.wait)
        go_on.set()
        assert await joined
        assert await once.get(2, go_on.wait)
