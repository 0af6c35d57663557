"""What is wanted again soon, guessed from how often and how recently it was used.

LRFU (Lee et al., "LRFU: a spectrum of policies that subsumes the least recently used and least frequently used
policies", 2001): a use counts one, and half as much after every ``half_life`` further uses of anything. Things keep
their counts when they leave, so that one that comes and goes is known for what it is. What stays is what is worth most:
the count times the seconds that bringing it back would take, for each byte that it takes.
"""

import math
from collections.abc import Hashable, Iterable
from typing import Generic, TypeVar

from deltazip_ray.errors import ConfigError

_Key = TypeVar("_Key", bound=Hashable)

HALF_LIFE = 2000.0
"""Uses. Long enough to tell the popular ones of some hundred versions, short enough to follow what changes."""

_REMEMBERED = 65536
"""Things at most; when there are more, the half that is wanted least is forgotten."""


class Popularity(Generic[_Key]):
    """Decayed counts of uses, as logarithms that are comparable at any time. It belongs to one event loop."""

    def __init__(self, half_life: float = HALF_LIFE) -> None:
        """``half_life`` in uses of anything; 1 is near to least recently used. Raises ConfigError."""
        if half_life < 1:
            raise ConfigError(f"a half-life of {half_life} uses is too short: at least 1 is needed")
        self._half_life = half_life
        self._uses = 0
        self._scores: dict[_Key, float] = {}

    def used(self, keys: Iterable[_Key]) -> None:
        """One use, of one thing or of several together."""
        self._uses += 1
        now = self._uses / self._half_life
        for key in keys:
            before = self._scores.get(key, -math.inf)
            self._scores[key] = max(now, before) + math.log2(1 + 2.0 ** -abs(now - before))
        if len(self._scores) > _REMEMBERED:
            kept = sorted(self._scores, key=self._scores.__getitem__)[_REMEMBERED // 2 :]
            self._scores = {key: self._scores[key] for key in kept}

    def worth(self, key: _Key, seconds_per_byte: float) -> float:
        """How much is lost when a thing leaves: larger for what should rather stay. Things never used come first."""
        return self._scores.get(key, -math.inf) + math.log2(max(seconds_per_byte, _INSTANT))


_INSTANT = 1e-15
"""Seconds for a byte: so that what costs nothing to bring back has a logarithm."""
