"""One request's results on their way from the step loop to whoever iterates over them."""

import asyncio

from deltazip_ray.errors import DeltaZipError
from deltazip_ray.scheduler.request import FinishReason, TokenChunk, TokenLogprobs


class TokenStream:
    """Joins what arrives faster than it is taken. Belongs to one event loop, with one reader."""

    def __init__(self) -> None:
        self._tokens: list[int] = []
        self._logprobs: list[TokenLogprobs] = []
        self._prompt: tuple[TokenLogprobs, ...] = ()
        self._finish: FinishReason | None = None
        self._stop: int | None = None
        self._error: DeltaZipError | None = None
        self._ready = asyncio.Event()
        self.begun = False
        """Whether anything was put."""

    def put(self, chunk: TokenChunk) -> None:
        """Add the next tokens; the reader hears of them at the next :meth:`wake`."""
        self.begun = True
        self._tokens += chunk.tokens
        if chunk.logprobs:
            self._logprobs += chunk.logprobs
        if chunk.prompt_logprobs:
            self._prompt = chunk.prompt_logprobs
        self._finish, self._stop = chunk.finish_reason, chunk.stop_token

    def wake(self) -> None:
        """Let the reader take what is there."""
        self._ready.set()

    def fail(self, error: DeltaZipError) -> None:
        """End with an error, after the tokens that have arrived."""
        self._error = error
        self._ready.set()

    async def get(self) -> TokenChunk:
        """All tokens that have arrived since the last call, at least one or the end. Raises what ``fail`` was given."""
        await self._ready.wait()
        if self._error is not None and not self._tokens:
            raise self._error
        chunk = TokenChunk(tuple(self._tokens), self._finish, None, tuple(self._logprobs), self._prompt, self._stop)
        self._tokens.clear()
        self._logprobs.clear()
        self._prompt = ()
        if self._error is None:
            self._ready.clear()
        return chunk
