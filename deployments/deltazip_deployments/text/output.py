"""The text of one output as its tokens arrive: decoded, and cut at stop strings."""

from collections.abc import Sequence

from deltazip_deployments.text.detokenizer import Detokenizer
from deltazip_deployments.text.stops import StopStrings


class OutputText:
    """Takes tokens, returns text."""

    def __init__(self, detokenizer: Detokenizer, stops: tuple[str, ...]) -> None:
        self._detokenizer = detokenizer
        self._stops = StopStrings(stops)

    @property
    def stopped(self) -> bool:
        """Whether a stop string has ended the text."""
        return self._stops.stopped

    def feed(self, tokens: Sequence[int]) -> str:
        """The text that can be sent now."""
        return self._stops.feed(self._detokenizer.feed(tokens)) if tokens else ""

    def finish(self) -> str:
        """The text that was held back; there are no more tokens."""
        if self.stopped:
            return ""
        return self._stops.feed(self._detokenizer.finish()) + self._stops.finish()
