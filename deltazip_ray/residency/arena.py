"""An allocator for one contiguous buffer. Never touches the buffer itself."""

import bisect

from deltazip_ray.errors import ConfigError, StoreError

ALIGNMENT = 4096
"""All offsets and allocated sizes are multiples of a page, so that copies and reads stay aligned."""


def aligned(size: int) -> int:
    """Bytes that an object of ``size`` bytes takes in an arena."""
    return max(1, -(-size // ALIGNMENT)) * ALIGNMENT


class ArenaAllocator:
    """First fit over a sorted list of gaps; adjacent gaps are merged. Allocations never move."""

    def __init__(self, size: int) -> None:
        """``size`` in bytes is rounded down to whole pages. Raises ConfigError when it is less than one."""
        self.size = size // ALIGNMENT * ALIGNMENT
        if not self.size:
            raise ConfigError(f"an arena of {size} bytes holds nothing: give it at least {ALIGNMENT}")
        self._gaps = [(0, self.size)]
        self._taken: dict[int, int] = {}

    @property
    def free_bytes(self) -> int:
        """Bytes in gaps."""
        return sum(size for _, size in self._gaps)

    def allocate(self, size: int) -> int | None:
        """Take ``size`` bytes and return their offset; None when no gap is large enough."""
        wanted = aligned(size)
        for index, (offset, gap) in enumerate(self._gaps):
            if gap >= wanted:
                self._gaps[index : index + 1] = [(offset + wanted, gap - wanted)] if gap > wanted else []
                self._taken[offset] = wanted
                return offset
        return None

    def free(self, offset: int) -> None:
        """Free what ``allocate`` returned. Raises KeyError for any other offset."""
        size = self._taken.pop(offset)
        index = bisect.bisect(self._gaps, (offset, 0))
        start, end = offset, offset + size
        if index < len(self._gaps) and self._gaps[index][0] == end:
            end += self._gaps.pop(index)[1]
        if index and sum(self._gaps[index - 1]) == start:
            index -= 1
            start = self._gaps.pop(index)[0]
        self._gaps.insert(index, (start, end - start))

    def check(self) -> None:
        """Raise StoreError unless gaps and allocations tile the arena, with no two gaps side by side."""
        position, after_gap = 0, False
        for offset, size, is_gap in sorted(
            [(*gap, True) for gap in self._gaps] + [(*t, False) for t in self._taken.items()]
        ):
            if offset != position or (is_gap and after_gap):
                raise StoreError(
                    f"arena: overlap, hole or split gap at byte {offset}; restart the node store and report this"
                )
            position, after_gap = offset + size, is_gap
        if position != self.size:
            raise StoreError(
                f"arena: {position} of {self.size} bytes accounted for; restart the node store and report this"
            )
