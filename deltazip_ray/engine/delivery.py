"""When those who wait for tokens are woken."""

import asyncio

from deltazip_ray.engine.token_stream import TokenStream
from deltazip_ray.scheduler.request import TokenChunk

READER_S = 0.0001
"""Of the event loop's time that is left to each reader between two times at which all get what came meanwhile: to wake
one costs more than to make its token."""
MOST_S = 0.02
"""However many there are."""


class Delivery:
    """Hands out tokens in small groups: a request's first and last at once, the others together. Of one event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._held: list[TokenStream] = []
        self._due = 0.0
        self._timer: asyncio.TimerHandle | None = None

    def put(self, stream: TokenStream, chunk: TokenChunk) -> None:
        """Add tokens to a stream; :meth:`settle` says when its reader hears of them."""
        at_once = chunk.finish_reason is not None or not stream.begun
        stream.put(chunk)
        if at_once:
            stream.wake()
        else:
            self._held.append(stream)

    def settle(self) -> None:
        """Call this after the tokens of each step."""
        if not self._held or self._timer is not None:
            return
        if self._loop.time() >= self._due:
            self._release()
        else:
            self._timer = self._loop.call_at(self._due, self._release)

    def _release(self) -> None:
        self._timer = None
        # A stream is held once a step.
        held, self._held = dict.fromkeys(self._held), []
        self._due = self._loop.time() + min(MOST_S, READER_S * len(held))
        for stream in held:
            stream.wake()
