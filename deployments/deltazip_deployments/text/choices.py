"""All outputs of one request: one, or several that share a prompt."""

import asyncio
import hashlib
from collections.abc import AsyncGenerator, Coroutine, Sequence
from contextlib import ExitStack, aclosing
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Self, TypeVar

from deltazip_deployments.text.generation import Generation, Piece
from deltazip_deployments.text.version_text import VersionText
from deltazip_ray.errors import DeltaZipError
from deltazip_ray.residency.tiers import Tier
from deltazip_ray.scheduler.request import FinishReason, GenerateRequest, TokenLogprobs

_T = TypeVar("_T")


@dataclass(frozen=True)
class Asked:
    """What all outputs share."""

    model: str
    version: str | None
    text: VersionText
    prompt: tuple[int, ...]
    choices: int
    """Number of outputs to return: the best ones, if there are more."""
    logprobs: int | None = None
    """Number of likeliest tokens to return with each output token; None: no log-probabilities."""
    prompt_logprobs: int | None = None
    """The same for the prompt, in a field of its own."""
    echo: str | None = None
    """The prompt's text, if it is to be put before each output."""


@dataclass(frozen=True)
class Choice:
    """A complete output."""

    text: str
    logprobs: tuple[tuple[int, TokenLogprobs], ...]
    finish_reason: FinishReason | None

    @property
    def likelihood(self) -> float:
        """Mean log-probability of its tokens."""
        return sum(told.chosen for _, told in self.logprobs) / max(1, len(self.logprobs))


class Choices:
    """The outputs being generated. Call :meth:`begin`, then take them in pieces or whole, and always close them."""

    def __init__(self, asked: Asked, outputs: Sequence[Generation], held: ExitStack | None = None) -> None:
        """``held`` is closed together with the outputs."""
        self.asked = asked
        self._outputs = outputs
        self._held = held or ExitStack()

    @property
    def tier(self) -> Tier:
        """Where the delta was when the request arrived; known after :meth:`begin`."""
        return self._outputs[0].tier

    def prompt_told(self, count: int) -> Sequence[tuple[int, TokenLogprobs | None]]:
        """The prompt's tokens with their log-probabilities and ``count`` likeliest ones; known after :meth:`begin`."""
        first, *others = self.asked.prompt
        told = [replace(one, best=one.best[:count]) for one in self._outputs[0].prompt_logprobs]
        return [(first, None), *zip(others, told, strict=True)]

    @property
    def completion_tokens(self) -> int:
        """Tokens generated so far, in all outputs."""
        return sum(output.completion_tokens for output in self._outputs)

    @property
    def finished(self) -> bool:
        """Whether all outputs are complete."""
        return all(output.finish_reason is not None for output in self._outputs)

    @property
    def error(self) -> DeltaZipError | None:
        """The first error, if any output failed."""
        return next((output.error for output in self._outputs if output.error is not None), None)

    async def begin(self) -> None:
        """Wait for each output's first tokens: errors before that can still become an HTTP status."""
        await _all([output.begin() for output in self._outputs])

    async def whole(self) -> list[Choice]:
        """The complete outputs, the best ones only. Raises the engine's errors, and RequestTimeout."""
        made = await _all([self._complete(output) for output in self._outputs])
        if len(made) > self.asked.choices:
            made = sorted(made, key=lambda choice: choice.likelihood, reverse=True)[: self.asked.choices]
        return made

    async def pieces(self) -> AsyncGenerator[tuple[int, Piece], None]:
        """(index of the output, its next piece), as they arrive. Raises as :meth:`whole` does."""
        streams = [output.pieces() for output in self._outputs]
        if len(streams) == 1:
            async with aclosing(streams[0]) as only:
                async for piece in only:
                    yield 0, piece
            return
        next_pieces = {asyncio.ensure_future(anext(stream)): index for index, stream in enumerate(streams)}
        try:
            while next_pieces:
                done, _ = await asyncio.wait(next_pieces, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    index, piece = next_pieces.pop(task), task.result()
                    if piece.finish_reason is None:
                        next_pieces[asyncio.ensure_future(anext(streams[index]))] = index
                    yield index, piece
        finally:
            for task in next_pieces:
                task.cancel()
            await asyncio.gather(*next_pieces, return_exceptions=True)
            for stream in streams:
                await stream.aclose()

    async def aclose(self) -> None:
        """End the request everywhere, if it has not ended already."""
        with self._held:
            for output in self._outputs:
                await output.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def _complete(self, output: Generation) -> Choice:
        pieces = [piece async for piece in output.pieces()]
        text = (self.asked.echo or "") + "".join(piece.text for piece in pieces)
        return Choice(text, tuple(told for piece in pieces for told in piece.logprobs), output.finish_reason)


async def _all(work: Sequence[Coroutine[Any, Any, _T]]) -> list[_T]:
    """The results of all; the first error cancels the rest and is raised."""
    if len(work) == 1:
        return [await work[0]]
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one) for one in work]
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from errors
    return [task.result() for task in tasks]


def nth(request: GenerateRequest, index: int) -> GenerateRequest:
    """The request of output ``index``: the same for the first one, with derived seeds for the others.

    Only the first one has prompt logprobs.
    """
    if index == 0:
        return request
    digest = hashlib.blake2b(f"{request.sampling.seed}/{index}".encode(), digest_size=8).digest()
    sampling = replace(request.sampling, seed=int.from_bytes(digest) >> 1, prompt_logprobs=None)
    return replace(request, request_id=f"{request.request_id}.{index}", sampling=sampling)
