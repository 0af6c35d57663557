"""The requests that the step loop is working on."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass

from deltazip_ray.engine.token_stream import TokenStream
from deltazip_ray.errors import DeltaZipError
from deltazip_ray.residency.slot_entries import Pin
from deltazip_ray.scheduler.outbox import News
from deltazip_ray.scheduler.request import TokenChunk


@dataclass(frozen=True)
class _Active:
    """One request."""

    stream: TokenStream
    pin: Pin | None
    """Returned when the loop reports the request's end: until then a step may read the slot."""


class ActiveRequests:
    """Their streams and pins, by the keys that the loop uses. Belongs to one event loop."""

    def __init__(self, unpin: Callable[[Pin], None]) -> None:
        """``unpin`` returns a pin."""
        self._unpin = unpin
        self._ids = itertools.count()
        self._active: dict[str, _Active] = {}

    def __len__(self) -> int:
        """Number of requests."""
        return len(self._active)

    def __contains__(self, key: str) -> bool:
        """Whether the request has not ended."""
        return key in self._active

    def add(self, request_id: str, pin: Pin | None) -> tuple[str, TokenStream]:
        """Add a request; returns its key and its token stream."""
        key = f"{request_id}#{next(self._ids)}"  # A client may reuse an id while the first request is ending.
        stream = TokenStream()
        self._active[key] = _Active(stream, pin)
        return key, stream

    def deliver(self, news: News) -> int:
        """Deliver the results of a step; returns the number of tokens."""
        tokens = 0
        for key, item in news:
            stream = self._active[key].stream
            if isinstance(item, TokenChunk):
                tokens += len(item.tokens)
                stream.put(item)
                if item.finish_reason is None:
                    continue
            elif item is not None:
                stream.fail(item)
            self._forget(key)
        return tokens

    def fail(self, error: DeltaZipError) -> None:
        """End all requests with an error."""
        for key in list(self._active):
            self._active[key].stream.fail(error)
            self._forget(key)

    def _forget(self, key: str) -> None:
        pin = self._active.pop(key).pin
        if pin is not None:
            self._unpin(pin)
