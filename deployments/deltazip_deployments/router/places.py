"""Places for requests in a router: the flood of one variant must not keep the others out.

Who is served next is decided in the engines, by fair shares; they cannot see who waits for a router that is full. So it
never is: a variant may have twice as many places as are free. One alone gets two thirds of all, two get two fifths
each, and so on (dynamic thresholds: Choudhury and Hahne, 1998).
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from deltazip_ray.errors import Overloaded

_SHARE = 2


class Places:
    """As many as the router answers requests at once. Belongs to one event loop."""

    def __init__(self, count: int) -> None:
        self._free = count
        self._taken: Counter[str] = Counter()

    @contextmanager
    def one(self, variant: str) -> Iterator[None]:
        """A place for a request of ``variant``, while the block runs. Raises Overloaded when it may have no more."""
        mine = self._taken[variant]
        if mine >= _SHARE * self._free:
            raise Overloaded(f"{mine} requests for {variant[:80]!r} are being answered already: try again later")
        self._free -= 1
        self._taken[variant] += 1
        try:
            yield
        finally:
            self._free += 1
            self._taken[variant] -= 1
            if not self._taken[variant]:
                del self._taken[variant]
