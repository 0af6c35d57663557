"""What requests are told, and when: first tokens and ends at once, the tokens between in turn."""

from collections.abc import Collection, Sequence
from itertools import islice

from deltazip_ray.errors import DeltaZipError
from deltazip_ray.scheduler.request import TokenChunk
from deltazip_ray.scheduler.sequence import SequenceState

End = TokenChunk | DeltaZipError | None
"""How a request ended: with its last tokens, with an error, or aborted."""
News = Sequence[tuple[str, End]]
"""Request ids and what is new: the next tokens, or the end."""


class Outbox:
    """News that nobody has taken yet."""

    def __init__(self) -> None:
        self._news: list[tuple[str, End]] = []
        self._untold: dict[SequenceState, None] = {}  # that have tokens to be told, who waits longest first
        self._ends: dict[SequenceState, End] = {}

    @property
    def ending(self) -> Collection[SequenceState]:
        """Requests that are over, and whose end is kept."""
        return self._ends

    def put(self, sequence: SequenceState) -> None:
        """A request that goes on has new tokens."""
        if sequence in self._untold:
            return
        if sequence.silent:
            self._news.append((sequence.request.request_id, sequence.tell()))
        else:
            self._untold[sequence] = None

    def end(self, sequence: SequenceState, end: End) -> None:
        """Keep the end of a request until :meth:`tell_end`; before an error come the tokens that were not told."""
        if sequence in self._untold:
            del self._untold[sequence]
            if isinstance(end, DeltaZipError):
                self._news.append((sequence.request.request_id, sequence.tell()))
        self._ends[sequence] = end

    def tell_end(self, sequence: SequenceState) -> None:
        """Tell the end that was kept."""
        self._news.append((sequence.request.request_id, self._ends.pop(sequence)))

    def take(self, turns: int | None) -> News:
        """See :meth:`Scheduler.take_news`."""
        news, self._news = self._news, []
        for sequence in list(islice(self._untold, turns)):
            del self._untold[sequence]
            news.append((sequence.request.request_id, sequence.tell()))
        return news
