"""One output being generated, as pieces of text."""

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import dataclass

from deltazip_deployments.text.output import OutputText
from deltazip_ray.errors import DeltaZipError, RequestTimeout
from deltazip_ray.residency.tiers import Tier
from deltazip_ray.scheduler.request import FinishReason, TokenChunk, TokenLogprobs


@dataclass(frozen=True, slots=True)
class Piece:
    """Text to send, and the log-probabilities of the tokens that arrived meanwhile, not always those of the text."""

    text: str
    logprobs: tuple[tuple[int, TokenLogprobs], ...] = ()
    finish_reason: FinishReason | None = None
    """On the last piece only, whose text may be empty."""


class Generation:
    """The text of one output. Call :meth:`begin`, iterate :meth:`pieces`, and always close it."""

    tier: Tier
    """Where the delta was when the request arrived; known after :meth:`begin`."""

    def __init__(self, chunks: AsyncGenerator[TokenChunk, None], text: OutputText, *, timeout_s: float) -> None:
        self._chunks = chunks
        self._text = text
        self._first: TokenChunk | None = None
        self._timeout_s = timeout_s
        self._deadline = asyncio.get_running_loop().time() + timeout_s
        self.tier = "device"
        self.prompt_logprobs: tuple[TokenLogprobs, ...] = ()
        """Of the prompt's tokens except the first, if requested; known after :meth:`begin`."""
        self.completion_tokens = 0
        self.finish_reason: FinishReason | None = None
        self.error: DeltaZipError | None = None

    async def begin(self) -> None:
        """Wait for the first chunk: errors before that can still become an HTTP status."""
        self._first = await self._next()
        self.prompt_logprobs = self._first.prompt_logprobs
        if self._first.tier is not None:
            self.tier = self._first.tier

    async def pieces(self) -> AsyncGenerator[Piece, None]:
        """The text as it arrives; only the last piece may be empty. Raises the engine's errors, RequestTimeout."""
        chunk = self._first or await self._next()
        while True:
            self.completion_tokens += len(chunk.tokens)
            text = self._text.feed(chunk.tokens)
            if self._text.stopped:
                self.finish_reason = "stop"
            elif chunk.finish_reason is not None:
                self.finish_reason = chunk.finish_reason
                text += self._text.finish()
                if self._text.stopped:
                    self.finish_reason = "stop"
            logprobs = _told(chunk)
            if text or logprobs or self.finish_reason is not None:
                yield Piece(text, logprobs, self.finish_reason)
            if self.finish_reason is not None:
                return
            chunk = await self._next()

    async def aclose(self) -> None:
        """End the request everywhere, if it has not ended already."""
        await self._chunks.aclose()

    async def _next(self) -> TokenChunk:
        try:
            async with asyncio.timeout_at(self._deadline):
                return await anext(self._chunks)
        except TimeoutError:
            self.error = RequestTimeout(
                f"the answer was not complete after {self._timeout_s:g} s: ask for fewer tokens"
            )
            raise self.error from None
        except DeltaZipError as error:
            self.error = error
            raise


def _told(chunk: TokenChunk) -> tuple[tuple[int, TokenLogprobs], ...]:
    """The chunk's tokens, including one that ended the output, with their log-probabilities."""
    if not chunk.logprobs:
        return ()
    ended = () if chunk.stop_token is None else (chunk.stop_token,)
    return tuple(zip((*chunk.tokens, *ended), chunk.logprobs, strict=True))
