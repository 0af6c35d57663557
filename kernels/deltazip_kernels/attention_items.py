"""Cuts the attention of a step into items of about equal size, on the host, with numpy.

An item is the work of one program for one KV head: rows of one sequence, and a range of its keys. Its FIELDS are
described in ``device/attention.py``.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

FIELDS = 8
SHORTEST = 192
"""Contexts of decodes are not cut into items of fewer keys, as each item has a fixed cost."""
_TILE = 64


@dataclass(frozen=True)
class Contexts:
    """The sequences of a step; all arrays ``[n]``."""

    rows: np.ndarray
    """The first row of each."""
    queries: np.ndarray
    """Its number of rows, which are its last tokens."""
    lengths: np.ndarray
    """Its tokens in the cache, including these."""
    tables: np.ndarray
    """Where its pages begin in the list of pages."""


def decode_items(contexts: Contexts, wanted: int, window: int | None = None) -> np.ndarray:
    """Items [n, FIELDS] int32 of sequences with one row each; the items of a sequence are neighbours.

    Long contexts are cut, so that there are up to ``wanted`` items of about equal size, or one for each sequence if
    those are more. With many sequences the longest ones come first.
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
    # Parts are whole tiles, but for the last one of a sequence.
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
    """Items of up to ``queries`` rows each, over all keys that these see; the longest come first."""
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
    """The items of several launches over the same sequences, and their pages, as one int32 array to be sent at once.

    Each launch's items are padded to ``most`` with items without rows. ``pages`` come last; field 4 of all items, given
    relative to ``pages``, becomes relative to the array.
    """
    width = most * FIELDS
    before = width * len(launches)
    packed = np.zeros(before + len(pages), dtype=np.int32)
    for i, items in enumerate(launches):
        items[:, 4] += before
        packed[i * width : i * width + items.size] = items.ravel()
    packed[before:] = pages
    return packed
