"""Requests that survive their replica: another one goes on where it stopped."""

import asyncio
import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace

from deltazip_deployments.router.backend import Backend
from deltazip_ray.errors import EngineStopped
from deltazip_ray.scheduler.request import GenerateRequest, TokenChunk

logger = logging.getLogger(__name__)

_PAUSE_S = 0.5
"""Before another try than the second: by then routers know of a replica whose engine has ended."""


async def generate_resuming(
    backend: Backend, request: GenerateRequest, attempts: int
) -> AsyncGenerator[TokenChunk, None]:
    """Like Backend.generate, but moves on up to ``attempts`` times when a replica is gone.

    The next replica gets the prompt and the tokens so far; what it draws depends on seed and position alone, so the
    output is the one that the first replica would have made. Raises EngineStopped after the last attempt.
    """
    made: list[int] = []
    for attempt in range(attempts + 1):
        if attempt > 1:
            await asyncio.sleep(_PAUSE_S)
        if len(made) >= request.sampling.max_tokens:
            # The replica was lost between its last token and the word that it was the last.
            yield TokenChunk((), "length")
            return
        part = replace(
            request,
            # A replica that is only slow to die must not take the second part for a duplicate of the first.
            request_id=f"{request.request_id}-{attempt}",
            prompt=request.prompt + tuple(made),
            output_offset=len(made),
            # What is told of the prompt came with the first tokens.
            sampling=replace(request.sampling, prompt_logprobs=None) if made else request.sampling,
        )
        try:
            async with aclosing(backend.generate(part)) as chunks:
                async for chunk in chunks:
                    made.extend(chunk.tokens)
                    yield chunk
            return
        except EngineStopped:
            if attempt == attempts:
                raise
            logger.warning("request %s lost its replica after %d tokens and moves on", request.request_id, len(made))


async def without_output(chunks: AsyncGenerator[TokenChunk, None]) -> AsyncGenerator[TokenChunk, None]:
    """What the first of ``chunks`` tells of the prompt, and no token."""
    async with aclosing(chunks):
        first = await anext(chunks)
        yield TokenChunk((), "length", first.tier, prompt_logprobs=first.prompt_logprobs)
