"""Places for requests in a router: one variant's flood must not keep the others out.

Who is served next is decided in the engines, by fair shares. They cannot see who waits for a router that is full.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from deltazip_ray.errors import Overloaded

_NEARLY_FULL = 0.75


class Places:
    """As many as the router answers requests at once. Belongs to one event loop."""

    def __init__(self, count: int) -> None:
        self._nearly_full = _NEARLY_FULL * count
        self._taken: Counter[str] = Counter()

    @contextmanager
    def one(self, variant: str) -> Iterator[None]:
        """A place for a request of ``variant``, while the block runs.

        Raises Overloaded where few are left and the variant has more than half of those that are taken.
        """
        mine, all_taken = self._taken[variant], self._taken.total()
        if all_taken >= self._nearly_full and 2 * mine > all_taken:
            raise Overloaded(f"{mine} requests for {variant[:80]!r} are being answered already: try again later")
        self._taken[variant] += 1
        try:
            yield
        finally:
            self._taken[variant] -= 1
            if not self._taken[variant]:
                del self._taken[variant]
