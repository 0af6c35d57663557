"""When those who wait for tokens are woken."""

import asyncio
from itertools import islice

from deltazip_ray.engine.token_stream import TokenStream
from deltazip_ray.scheduler.request import TokenChunk

READER_S = 0.0004
"""Time for each reader that is woken. Under Serve one costs 60 to 90 us of the interpreter, which the steps share: this
leaves them four fifths of it, however many readers there are."""


class Delivery:
    """Hands out tokens in small groups: a request's first and last at once, the others when it is their reader's turn.

    Belongs to one event loop.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._held: dict[TokenStream, None] = {}
        """Whose readers wait, the one that has waited longest first."""
        self._since = loop.time()
        self._timer: asyncio.TimerHandle | None = None

    def put(self, stream: TokenStream, chunk: TokenChunk) -> None:
        """Add tokens to a stream; :meth:`settle` says when its reader hears of them."""
        at_once = chunk.finish_reason is not None or not stream.begun
        stream.put(chunk)
        if at_once:
            stream.wake()
            self._held.pop(stream, None)
        else:
            self._held[stream] = None

    def settle(self) -> None:
        """Wake as many readers as there was time for since the last call that woke some; call it after each step."""
        now = self._loop.time()
        turns = int((now - self._since) / READER_S)
        if turns and self._held:
            self._since = now
            for stream in list(islice(self._held, turns)):
                del self._held[stream]
                stream.wake()
        if self._held and self._timer is None:
            self._timer = self._loop.call_later(READER_S * len(self._held), self._late)

    def _late(self) -> None:
        """The next step takes its time."""
        self._timer = None
        self.settle()
