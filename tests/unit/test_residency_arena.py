"""The arena's allocator against a model that knows only which pages are taken."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deltazip_ray.errors import ConfigError, StoreError
from deltazip_ray.residency.arena import ALIGNMENT, ArenaAllocator, aligned

PAGES = 16


def test_neighbouring_gaps_become_one() -> None:
    arena = ArenaAllocator(3 * ALIGNMENT)
    offsets = [arena.allocate(ALIGNMENT) for _ in range(3)]
    assert offsets == [0, ALIGNMENT, 2 * ALIGNMENT]
    assert arena.allocate(1) is None
    for offset in (0, 2 * ALIGNMENT, ALIGNMENT):
        arena.free(offset)
    assert arena.allocate(3 * ALIGNMENT) == 0


def test_the_first_gap_that_fits_is_taken() -> None:
    arena = ArenaAllocator(5 * ALIGNMENT)
    for _ in range(5):
        arena.allocate(ALIGNMENT)
    for offset in (0, 2 * ALIGNMENT, 3 * ALIGNMENT):
        arena.free(offset)
    assert arena.allocate(2 * ALIGNMENT) == 2 * ALIGNMENT
    assert arena.allocate(1) == 0


def test_sizes_are_whole_pages() -> None:
    assert [aligned(size) for size in (0, 1, ALIGNMENT, ALIGNMENT + 1)] == [
        ALIGNMENT,
        ALIGNMENT,
        ALIGNMENT,
        2 * ALIGNMENT,
    ]
    assert ArenaAllocator(2 * ALIGNMENT - 1).size == ALIGNMENT


def test_an_arena_without_a_page_is_refused() -> None:
    with pytest.raises(ConfigError):
        ArenaAllocator(ALIGNMENT - 1)


def test_what_is_not_taken_cannot_be_freed() -> None:
    arena = ArenaAllocator(ALIGNMENT)
    with pytest.raises(KeyError):
        arena.free(0)


def test_check_sees_lost_bytes() -> None:
    arena = ArenaAllocator(2 * ALIGNMENT)
    arena.allocate(1)
    arena._taken.clear()
    with pytest.raises(StoreError):
        arena.check()


@settings(deadline=None)
@given(st.lists(st.one_of(st.integers(1, 6 * ALIGNMENT), st.integers(-40, -1)), max_size=80))
def test_pieces_never_overlap_and_a_gap_that_fits_is_found(steps: list[int]) -> None:
    """A positive step allocates as many bytes; a negative one frees one of the pieces."""
    arena = ArenaAllocator(PAGES * ALIGNMENT)
    pieces: dict[int, int] = {}
    pages = [False] * PAGES
    for step in steps:
        if step > 0:
            wanted = -(-step // ALIGNMENT)
            fits = [p for p in range(PAGES - wanted + 1) if not any(pages[p : p + wanted])]
            offset = arena.allocate(step)
            assert offset == (fits[0] * ALIGNMENT if fits else None), "first fit"
            if offset is not None:
                pieces[offset] = wanted
                pages[fits[0] : fits[0] + wanted] = [True] * wanted
        elif pieces:
            offset = sorted(pieces)[step % len(pieces)]
            arena.free(offset)
            wanted = pieces.pop(offset)
            pages[offset // ALIGNMENT : offset // ALIGNMENT + wanted] = [False] * wanted
        arena.check()
        assert arena.free_bytes == pages.count(False) * ALIGNMENT
