"""Limits the outputs of each variant in a router, so that a flood of one does not keep the others out.

Fair sharing happens in the engines, which do not see requests that a full router rejects. So a router keeps
places free: a request is taken while its variant has less than twice as many places as are free, one for each output.
One variant alone gets two thirds of all, two get two fifths each, and so on (dynamic thresholds: Choudhury and Hahne,
1998), and the last request's other outputs beyond that.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from deltazip_ray.errors import Overloaded

_SHARE = 2


class Places:
    """The places for requests that the router handles at once. Belongs to one event loop."""

    def __init__(self, count: int) -> None:
        self._free = count
        self._taken: Counter[str] = Counter()

    @contextmanager
    def taken(self, variant: str, count: int) -> Iterator[None]:
        """Take ``count`` places for ``variant`` during the block. Raises Overloaded if the variant has too many."""
        mine = self._taken[variant]
        if mine >= _SHARE * self._free:
            raise Overloaded(f"{mine} outputs of {variant[:80]!r} are in progress already: try again later")
        self._free -= count
        self._taken[variant] += count
        try:
            yield
        finally:
            self._free += count
            self._taken[variant] -= count
            if not self._taken[variant]:
                del self._taken[variant]
