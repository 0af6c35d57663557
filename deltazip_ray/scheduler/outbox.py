"""Delivery of tokens to requests: first tokens and ends at once, the tokens between in turn."""

from collections.abc import Collection, Sequence
from itertools import islice

from deltazip_ray.errors import DeltaZipError
from deltazip_ray.scheduler.request import TokenChunk
from deltazip_ray.scheduler.sequence import SequenceState

End = TokenChunk | DeltaZipError | None
"""The end of a request: its last tokens, an error, or None if it was aborted."""
News = Sequence[tuple[str, End]]
"""(request id, its next tokens or its end)."""


class Outbox:
    """Tokens and ends that were not delivered yet."""

    def __init__(self) -> None:
        self._news: list[tuple[str, End]] = []
        self._untold: dict[SequenceState, None] = {}  # with tokens to deliver, the longest wait first
        self._ends: dict[SequenceState, End] = {}

    @property
    def ending(self) -> Collection[SequenceState]:
        """Requests that have ended, but whose end must not be delivered yet."""
        return self._ends

    def put(self, sequence: SequenceState) -> None:
        """A running request has new tokens."""
        if sequence in self._untold:
            return
        if sequence.silent:
            self._news.append((sequence.request.request_id, sequence.tell()))
        else:
            self._untold[sequence] = None

    def end(self, sequence: SequenceState, end: End) -> None:
        """Keep the end of a request until :meth:`tell_end`. Undelivered tokens are delivered before an error."""
        if sequence in self._untold:
            del self._untold[sequence]
            if isinstance(end, DeltaZipError):
                self._news.append((sequence.request.request_id, sequence.tell()))
        self._ends[sequence] = end

    def tell_end(self, sequence: SequenceState) -> None:
        """Deliver the end that was kept."""
        self._news.append((sequence.request.request_id, self._ends.pop(sequence)))

    def take(self, turns: int | None) -> News:
        """See :meth:`Scheduler.take_news`."""
        news, self._news = self._news, []
        for sequence in list(islice(self._untold, turns)):
            del self._untold[sequence]
            news.append((sequence.request.request_id, sequence.tell()))
        return news
