"""Blocks are handed out all or nothing, and always add up."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deltazip_ray.errors import ConfigError, EngineError
from deltazip_ray.kvcache.block_manager import BlockManager


def test_a_table_grows_block_by_block_and_keeps_what_it_has() -> None:
    blocks = BlockManager(num_blocks=4, block_size=16)
    assert blocks.grow("a", 16)
    first = list(blocks.table("a"))
    assert len(first) == 1
    assert blocks.grow("a", 17)
    assert list(blocks.table("a"))[:1] == first
    assert len(blocks.table("a")) == 2
    assert blocks.grow("a", 3), "never shrinks"
    assert len(blocks.table("a")) == 2


def test_too_few_blocks_change_nothing() -> None:
    blocks = BlockManager(num_blocks=4, block_size=1)
    assert blocks.grow("a", 3)
    assert not blocks.grow("b", 2)
    assert not blocks.grow("a", 5)
    assert (blocks.free_blocks, len(blocks.table("a"))) == (1, 3)
    with pytest.raises(KeyError):
        blocks.table("b")
    blocks.check()


def test_a_freed_table_stays_readable_for_the_step_that_uses_it() -> None:
    blocks = BlockManager(num_blocks=2, block_size=1)
    blocks.grow("a", 2)
    table = blocks.table("a")
    before = list(table)
    blocks.free("a")
    blocks.grow("b", 2)
    assert list(table) == before


def test_freeing_somebody_without_blocks_is_fine() -> None:
    blocks = BlockManager(num_blocks=2, block_size=1)
    blocks.free("nobody")
    assert blocks.free_blocks == 2


@pytest.mark.parametrize(("num_blocks", "block_size"), [(0, 1), (1, 0)])
def test_nonsense_sizes_are_refused(num_blocks: int, block_size: int) -> None:
    with pytest.raises(ConfigError):
        BlockManager(num_blocks, block_size)


def test_check_sees_a_block_that_is_held_twice() -> None:
    blocks = BlockManager(num_blocks=2, block_size=1)
    blocks.grow("a", 1)
    blocks.grow("b", 1)
    blocks.table("b")[0] = blocks.table("a")[0]  # type: ignore[index]  # the damage that check must see
    with pytest.raises(EngineError, match="add up"):
        blocks.check()


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abcd"), st.integers(0, 40)), max_size=60), st.integers(1, 5))
def test_blocks_add_up_after_any_sequence_of_operations(operations: list[tuple[str, int]], block_size: int) -> None:
    """Zero tokens stand for freeing; sizes are compared with a model that only counts."""
    blocks = BlockManager(num_blocks=12, block_size=block_size)
    held: dict[str, int] = {}
    for owner, tokens in operations:
        if tokens == 0:
            blocks.free(owner)
            held.pop(owner, None)
        else:
            wanted = max(-(-tokens // block_size), held.get(owner, 0))
            fits = wanted + sum(n for name, n in held.items() if name != owner) <= 12
            assert blocks.grow(owner, tokens) == fits
            if fits:
                held[owner] = wanted
        blocks.check()
        assert blocks.free_blocks == 12 - sum(held.values())
