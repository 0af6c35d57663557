"""Passes one request's tokens from the step loop to their reader."""

import asyncio

from deltazip_ray.errors import DeltaZipError
from deltazip_ray.scheduler.request import TokenChunk

_NOTHING = TokenChunk(())


class TokenStream:
    """Joins chunks that arrive faster than they are read. Belongs to one event loop, with one reader."""

    def __init__(self) -> None:
        self._chunk = _NOTHING
        self._error: DeltaZipError | None = None
        self._ready = asyncio.Event()

    def put(self, chunk: TokenChunk) -> None:
        """Add the next tokens."""
        self._chunk = chunk if self._chunk is _NOTHING else _joined(self._chunk, chunk)
        self._ready.set()

    def fail(self, error: DeltaZipError) -> None:
        """End with an error, after the tokens that have arrived."""
        self._error = error
        self._ready.set()

    async def get(self) -> TokenChunk:
        """All tokens since the last call; waits for at least one, or the end. Raises the error of :meth:`fail`."""
        await self._ready.wait()
        chunk, self._chunk = self._chunk, _NOTHING
        if self._error is None:
            self._ready.clear()
        elif chunk is _NOTHING:
            raise self._error
        return chunk


def _joined(first: TokenChunk, second: TokenChunk) -> TokenChunk:
    return second._replace(
        tokens=first.tokens + second.tokens,
        logprobs=first.logprobs + second.logprobs,
        prompt_logprobs=first.prompt_logprobs or second.prompt_logprobs,
    )
