"""The requests that the step loop has."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass

from deltazip_ray.engine.token_stream import TokenStream
from deltazip_ray.errors import DeltaZipError
from deltazip_ray.residency.slot_table import Pin
from deltazip_ray.scheduler.outbox import News
from deltazip_ray.scheduler.request import TokenChunk


@dataclass(frozen=True)
class _Active:
    """One request."""

    stream: TokenStream
    pin: Pin | None
    """Given back only when the loop says that the request is over: until then a step may read the slot."""


class ActiveRequests:
    """Their streams and pins, by the keys under which the loop knows them. Belongs to one event loop."""

    def __init__(self, unpin: Callable[[Pin], None]) -> None:
        """``unpin`` takes a pin back."""
        self._unpin = unpin
        self._ids = itertools.count()
        self._active: dict[str, _Active] = {}

    def __len__(self) -> int:
        """How many there are."""
        return len(self._active)

    def __contains__(self, key: str) -> bool:
        """Whether its end has not come."""
        return key in self._active

    def add(self, request_id: str, pin: Pin | None) -> tuple[str, TokenStream]:
        """A key for a request, and the stream of its tokens."""
        key = f"{request_id}#{next(self._ids)}"  # A client may send an id again while the first one ends.
        stream = TokenStream()
        self._active[key] = _Active(stream, pin)
        return key, stream

    def deliver(self, news: News) -> int:
        """What a step brought; returns how many tokens."""
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
        """End all of them."""
        for key in list(self._active):
            self._active[key].stream.fail(error)
            self._forget(key)

    def _forget(self, key: str) -> None:
        pin = self._active.pop(key).pin
        if pin is not None:
            self._unpin(pin)
