"""Names of full KV blocks: equal names mean equal keys and values.

The content of a block depends on the model, on its own tokens and on all tokens before them. So the name of a block is
a digest of its tokens and the name of the block before it, and the chain starts with the digest of the version:
versions share blocks neither with each other nor with the base.
"""

from array import array
from collections.abc import Sequence
from hashlib import blake2b

_BYTES = 16


class BlockNames:
    """The names of one sequence's blocks, computed when needed."""

    __slots__ = ("_block_size", "_names", "_root", "_tokens")

    def __init__(self, version: str | None, tokens: Sequence[int], block_size: int) -> None:
        """``tokens`` may only be appended to; ``version`` is None for the base."""
        self._root = blake2b(b"base" if version is None else b"version" + version.encode(), digest_size=_BYTES).digest()
        self._tokens = tokens
        self._block_size = block_size
        self._names: list[bytes] = []

    def first(self, count: int) -> list[bytes]:
        """Names of the first ``count`` blocks, whose tokens must all be known."""
        names, size = self._names, self._block_size
        for i in range(len(names), count):
            content = array("q", self._tokens[i * size : (i + 1) * size]).tobytes()
            names.append(blake2b((names[-1] if names else self._root) + content, digest_size=_BYTES).digest())
        return names[:count]
