"""Block tables as the arrays that paged attention kernels need."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from deltazip_ray.kvcache.block_manager import BlockTable
from deltazip_ray.layers.attention.backend import SequenceRows


@dataclass(frozen=True)
class PagedTables:
    """The pages of all sequences, concatenated; all int32."""

    starts: np.ndarray
    """``[sequences + 1]``: where the pages of each begin in ``pages``."""
    pages: np.ndarray
    last: np.ndarray
    """``[sequences]``: tokens in the last page of each, 1 to block_size."""


def page_tables(sequences: Sequence[SequenceRows], block_size: int) -> PagedTables:
    """Tables of ``sequences`` after the step has written its keys."""
    starts, pages = joined([sequence.blocks[: -(-sequence.context // block_size)] for sequence in sequences])
    last = [(sequence.context - 1) % block_size + 1 for sequence in sequences]
    return PagedTables(starts, pages, np.array(last, dtype=np.int32))


def joined(tables: Sequence[BlockTable]) -> tuple[np.ndarray, np.ndarray]:
    """The start of each table, ``[tables + 1]``, and the pages of all tables, concatenated; int32."""
    starts = np.zeros(len(tables) + 1, dtype=np.int32)
    np.cumsum([len(table) for table in tables], out=starts[1:])
    return starts, np.frombuffer(bytearray().join(tables), dtype=np.int32)


def cache_rows(sequences: Sequence[SequenceRows], block_size: int) -> np.ndarray:
    """``[rows]`` int64: cache positions of the new tokens of ``sequences``."""
    tables = page_tables(sequences, block_size)
    queries = np.array([sequence.queries for sequence in sequences])
    contexts = np.array([sequence.context for sequence in sequences])
    of = np.repeat(np.arange(len(queries)), queries)
    positions = np.arange(len(of)) + (contexts - np.cumsum(queries))[of]
    blocks = tables.pages[tables.starts[of] + positions // block_size].astype(np.int64)
    rows: np.ndarray = blocks * block_size + positions % block_size
    return rows
