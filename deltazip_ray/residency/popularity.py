"""What to keep: how often and how recently something was used, times the cost of bringing it back.

LRFU (Lee et al., "LRFU: a spectrum of policies that subsumes the least recently used and least frequently used
policies", 2001): a use counts one, and half as much after every ``half_life`` further uses of anything. Counts survive
an eviction, so that things that come and go keep their history. A thing's value is its count times the seconds per
byte that bringing it back would take.
"""

import math
from collections.abc import Hashable, Iterable
from typing import Generic, TypeVar

from deltazip_ray.errors import ConfigError

_Key = TypeVar("_Key", bound=Hashable)

HALF_LIFE = 2000.0
"""In uses. Long enough to rank some hundred versions, short enough to follow changes."""

_REMEMBERED = 65536
"""Limit of counts kept; beyond it the less popular half is forgotten."""


class Popularity(Generic[_Key]):
    """Decayed counts of uses, kept as logarithms that need no update as time passes. Belongs to one event loop."""

    def __init__(self, half_life: float = HALF_LIFE) -> None:
        """``half_life`` in uses of anything; 1 is almost LRU. Raises ConfigError."""
        if half_life < 1:
            raise ConfigError(f"a half-life of {half_life} uses is too short: at least 1 is needed")
        self._half_life = half_life
        self._uses = 0
        self._scores: dict[_Key, float] = {}

    def used(self, keys: Iterable[_Key]) -> None:
        """Count one use of these keys together."""
        self._uses += 1
        now = self._uses / self._half_life
        for key in keys:
            before = self._scores.get(key, -math.inf)
            self._scores[key] = max(now, before) + math.log2(1 + 2.0 ** -abs(now - before))
        if len(self._scores) > _REMEMBERED:
            kept = sorted(self._scores, key=self._scores.__getitem__)[_REMEMBERED // 2 :]
            self._scores = {key: self._scores[key] for key in kept}

    def worth(self, key: _Key, seconds_per_byte: float) -> float:
        """The log of the value; evict the lowest first. Things that were never used have the lowest of all."""
        return self._scores.get(key, -math.inf) + math.log2(max(seconds_per_byte, _INSTANT))


_INSTANT = 1e-15
"""Least seconds per byte, so that the logarithm exists."""
