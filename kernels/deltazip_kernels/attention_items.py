"""Attention's work as items of like size: numpy alone, on the host, once a step.

An item is what one program does for one KV head: rows of one sequence, and a range of its keys. See the kernel
(``device/attention.py``) for its numbers.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

FIELDS = 8
SHORTEST = 192
"""Keys below which the item of a decode is not cut again: each has a fixed cost."""
_TILE = 64


@dataclass(frozen=True)
class Contexts:
    """Sequences of a step, each ``[n]``."""

    rows: np.ndarray
    """Where in the step their rows begin."""
    queries: np.ndarray
    """Rows that they have: their last tokens."""
    lengths: np.ndarray
    """Tokens in the cache, these included."""
    tables: np.ndarray
    """Where their pages begin in the list of pages."""


def decode_items(contexts: Contexts, wanted: int, window: int | None = None) -> np.ndarray:
    """Items [n, FIELDS] int32 of sequences of one row, in about equal parts; those of a sequence are neighbours.

    At most ``wanted``, or one for each sequence; of many sequences those that take longest begin first.
    """
    if len(contexts.lengths) > 2 * wanted:
        order = np.argsort(-contexts.lengths, kind="stable")
        rows, queries, lengths, tables = contexts.rows, contexts.queries, contexts.lengths, contexts.tables
        contexts = Contexts(rows[order], queries[order], lengths[order], tables[order])
    begins = np.zeros_like(contexts.lengths) if window is None else np.maximum(contexts.lengths - window, 0)
    lengths = contexts.lengths - begins
    room = max(wanted, len(lengths))
    most = max(SHORTEST, -(-int(lengths.sum()) // room))
    while (counts := np.maximum((lengths + most // 2) // most, 1)).sum() > room:
        most += most // 8
    # In whole tiles; the last part of a sequence has what is left.
    sizes = (lengths + counts * _TILE - 1) // (counts * _TILE) * _TILE
    counts = -(-lengths // sizes)
    firsts = np.cumsum(counts) - counts
    of = np.repeat(np.arange(len(counts)), counts)
    done = (np.arange(len(of)) - firsts[of]) * sizes[of]
    items = np.zeros((len(of), FIELDS), dtype=np.int32)
    items[:, 0] = contexts.rows[of]
    items[:, 1] = 1
    items[:, 2] = begins[of] + done
    items[:, 3] = begins[of] + np.minimum(done + sizes[of], lengths[of])
    items[:, 4] = contexts.tables[of]
    items[:, 5] = contexts.lengths[of] - 1
    items[:, 6] = counts[of]
    items[:, 7] = firsts[of]
    return items


def prefill_items(contexts: Contexts, queries: int, window: int | None = None) -> np.ndarray:
    """Items of up to ``queries`` rows each, over all that the rows see; those that take longest begin first."""
    counts = -(-contexts.queries // queries)
    of = np.repeat(np.arange(len(counts)), counts)
    done = (np.arange(len(of)) - (np.cumsum(counts) - counts)[of]) * queries
    position = (contexts.lengths - contexts.queries)[of] + done
    items = np.zeros((len(of), FIELDS), dtype=np.int32)
    items[:, 0] = contexts.rows[of] + done
    items[:, 1] = np.minimum(contexts.queries[of] - done, queries)
    items[:, 2] = 0 if window is None else np.maximum(position - window + 1, 0)
    items[:, 3] = position + items[:, 1]
    items[:, 4] = contexts.tables[of]
    items[:, 5] = position
    return items[np.argsort(items[:, 2] - items[:, 3], kind="stable")]


def pack(launches: Sequence[np.ndarray], pages: np.ndarray, most: int) -> np.ndarray:
    """What launches over the same sequences read, as one int32 array.

    The items of each launch, filled up to ``most`` with items that have no rows; then the pages that items point to, by
    their place in the array.
    """
    width = most * FIELDS
    before = width * len(launches)
    packed = np.zeros(before + len(pages), dtype=np.int32)
    for i, items in enumerate(launches):
        items[:, 4] += before
        packed[i * width : i * width + items.size] = items.ravel()
    packed[before:] = pages
    return packed
