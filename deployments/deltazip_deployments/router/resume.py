"""Resumes requests on another replica if theirs dies."""

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
"""Pause before the third and later attempts: by then routers know that a replica's engine has ended."""


async def generate_resuming(
    backend: Backend, request: GenerateRequest, attempts: int
) -> AsyncGenerator[TokenChunk, None]:
    """Like Backend.generate, but resumes up to ``attempts`` times if a replica is gone.

    The next replica gets the prompt and the tokens so far. Its draws depend on seed and position only, so the output is
    the same as the first replica's would have been. Raises EngineStopped after the last attempt.
    """
    made: list[int] = []
    for attempt in range(attempts + 1):
        if attempt > 1:
            await asyncio.sleep(_PAUSE_S)
        if len(made) >= request.sampling.max_tokens:
            # The replica was lost after its last token, before it reported the end.
            yield TokenChunk((), "length")
            return
        part = replace(
            request,
            # If the replica is still alive, it must not take this for a duplicate request.
            request_id=f"{request.request_id}-{attempt}",
            prompt=request.prompt + tuple(made),
            output_offset=len(made),
            # Prompt logprobs came with the first tokens.
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
            logger.warning("request %s lost its replica after %d tokens; resuming", request.request_id, len(made))


async def without_output(chunks: AsyncGenerator[TokenChunk, None]) -> AsyncGenerator[TokenChunk, None]:
    """The prompt logprobs of the first chunk, without any token."""
    async with aclosing(chunks):
        first = await anext(chunks)
        yield TokenChunk((), "length", first.tier, prompt_logprobs=first.prompt_logprobs)
