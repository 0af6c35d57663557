"""What a reader gets of tokens that come faster than it takes them."""

import asyncio

import pytest

from deltazip_ray.engine.token_stream import TokenStream
from deltazip_ray.errors import EngineStopped
from deltazip_ray.scheduler.request import TokenChunk, TokenLogprobs


async def test_what_came_meanwhile_is_one_chunk_in_the_order_in_which_it_came() -> None:
    stream = TokenStream()
    told = [TokenLogprobs(-float(i)) for i in range(4)]
    stream.put(TokenChunk((1, 2), logprobs=(told[0], told[1]), prompt_logprobs=(told[3],)))
    stream.put(TokenChunk((3,), "stop", logprobs=(told[2],), stop_token=9))
    joined = TokenChunk((1, 2, 3), "stop", None, tuple(told[:3]), (told[3],), 9)
    assert await stream.get() == joined


async def test_a_reader_waits_for_what_comes_next() -> None:
    stream = TokenStream()
    for token in (1, 2):
        reader = asyncio.create_task(stream.get())
        await asyncio.sleep(0)
        assert not reader.done()
        stream.put(TokenChunk((token,)))
        assert await reader == TokenChunk((token,))


async def test_an_error_comes_behind_the_tokens_and_stays() -> None:
    stream = TokenStream()
    stream.put(TokenChunk((1,)))
    stream.fail(EngineStopped("gone"))
    assert await stream.get() == TokenChunk((1,))
    for _ in range(2):
        with pytest.raises(EngineStopped):
            await stream.get()
