"""Blocks are handed out all or nothing, shared by name, forgotten least recently used first, and always add up."""

from array import array
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deltazip_ray.errors import ConfigError, EngineError
from deltazip_ray.kvcache.block_manager import BlockManager, BlockTable
from deltazip_ray.kvcache.block_names import BlockNames


def of(*blocks: int) -> BlockTable:
    return array("i", blocks)


def start(blocks: BlockManager, tokens: int, *names: bytes, spare: int = 0) -> BlockTable:
    found = blocks.start(tokens, names, spare)
    assert found is not None
    return found[0]


def named(blocks: BlockManager, *names: bytes) -> BlockTable:
    """A freed table of one-token blocks with names."""
    table = start(blocks, len(names))
    for block, name in zip(table, names, strict=True):
        blocks.name(block, name)
    blocks.free(table)
    return table


def test_a_table_grows_block_by_block_and_keeps_what_it_has() -> None:
    blocks = BlockManager(num_blocks=4, block_size=16)
    table = start(blocks, 16)
    first = table[:]
    assert len(first) == 1
    assert blocks.grow(table, 17)
    assert (table[:1], len(table)) == (first, 2)
    assert blocks.grow(table, 3), "never shrinks"
    assert len(table) == 2


def test_too_few_blocks_change_nothing() -> None:
    blocks = BlockManager(num_blocks=4, block_size=1)
    table = start(blocks, 3)
    assert blocks.start(2, (), 0) is None
    assert blocks.start(1, (), 1) is None, "one has to stay free"
    assert not blocks.grow(table, 5)
    assert (blocks.free_blocks, len(table)) == (1, 3)
    blocks.check([table])


def test_a_freed_table_stays_readable_for_the_step_that_uses_it() -> None:
    blocks = BlockManager(num_blocks=2, block_size=1)
    table = start(blocks, 2)
    before = table[:]
    blocks.free(table)
    start(blocks, 2)
    assert table == before


def test_named_blocks_are_shared_while_held_and_after() -> None:
    blocks = BlockManager(num_blocks=6, block_size=1)
    table = start(blocks, 2)
    blocks.name(table[0], b"x")
    blocks.name(table[1], b"xy")
    assert blocks.start(3, (b"x", b"xy", b"xyz"), 0) == (of(*table, 2), 2)
    assert blocks.free_blocks == 3
    blocks.free(table)
    assert blocks.free_blocks == 3, "the other one holds them"
    blocks.check([of(*table, 2)])
    blocks.free(of(*table, 2))
    assert blocks.free_blocks == 6
    assert blocks.start(2, (b"y", b"xy"), 0) == (of(2, 3), 0), "a prefix or nothing"


def test_shared_blocks_that_nobody_holds_count_as_taken() -> None:
    blocks = BlockManager(num_blocks=3, block_size=1)
    table = named(blocks, b"x", b"xy")
    assert blocks.start(3, (b"x", b"xy"), spare=1) is None
    assert blocks.start(2, (b"x", b"xy"), spare=1) == (table, 2)


def test_blocks_without_a_name_go_first_then_the_least_recently_used_from_the_end() -> None:
    blocks = BlockManager(num_blocks=5, block_size=1)
    old, new = named(blocks, b"a", b"ab"), named(blocks, b"c", b"cd")
    blocks.free(start(blocks, 2, b"a", b"ab"))
    assert start(blocks, 5) == of(4, new[1], new[0], old[1], old[0])


def test_a_name_stays_with_its_block_and_a_block_with_its_name() -> None:
    blocks = BlockManager(num_blocks=4, block_size=1)
    table = start(blocks, 2)
    blocks.name(table[0], b"x")
    blocks.name(table[0], b"y")
    blocks.name(table[1], b"x")
    assert blocks.start(1, (b"x",), 0) == (of(table[0]), 1)
    assert blocks.start(1, (b"y",), 0) == (of(2), 0)


def test_forgotten_names_are_shared_no_more() -> None:
    blocks = BlockManager(num_blocks=3, block_size=1)
    table = named(blocks, b"x", b"xy")
    held = start(blocks, 1, b"x")
    blocks.forget(table)
    assert blocks.free_blocks == 2
    assert blocks.start(1, (b"x",), 0) == (of(table[1]), 0), "free, and with nothing in it that is wanted"
    assert held == of(table[0])


def test_a_table_may_grow_into_the_last_block() -> None:
    blocks = BlockManager(num_blocks=2, block_size=4)
    table = start(blocks, 4)
    assert blocks.grow(table, 8), "a request that fits alone must get them all, or it preempts itself for ever"
    assert not blocks.grow(table, 9)
    blocks.check([table])


def test_lent_blocks_are_taken_last_and_go_with_their_names() -> None:
    blocks = BlockManager(num_blocks=2, block_size=1)
    blocks.lend(range(5, 8))
    table = start(blocks, 4)
    assert table == of(0, 1, 5, 6)
    blocks.name(table[3], b"x")
    with pytest.raises(EngineError, match="from 5 on are held"):
        blocks.take_back(range(5, 8))
    blocks.check([table])
    blocks.free(table)
    blocks.take_back(range(5, 8))
    assert (blocks.num_blocks, blocks.free_blocks) == (2, 2)
    assert blocks.start(1, (b"x",), 0) == (of(0), 0), "its content is somebody else's"


@pytest.mark.parametrize(("num_blocks", "block_size"), [(0, 1), (1, 0)])
def test_nonsense_sizes_are_refused(num_blocks: int, block_size: int) -> None:
    with pytest.raises(ConfigError):
        BlockManager(num_blocks, block_size)


def test_check_sees_blocks_that_are_lost_or_held_twice() -> None:
    blocks = BlockManager(num_blocks=3, block_size=1)
    table = start(blocks, 2)
    for wrong in ([], [table, table], [[table[0], table[0]]], [[0, 1, 2]]):
        with pytest.raises(EngineError, match="add up"):
            blocks.check(wrong)
    blocks.check([table])


@pytest.mark.parametrize("other", [("v1", [1, 2, 3, 4]), (None, [1, 2, 3, 4]), ("v0", [1, 2, 4, 3])])
def test_names_tell_versions_and_tokens_apart(other: tuple[str | None, list[int]]) -> None:
    names = BlockNames("v0", [1, 2, 3, 4], 2)
    assert names.first(2) == [*BlockNames("v0", [1, 2, 9, 9], 2).first(1), *names.first(2)[1:]]
    assert BlockNames(*other, 2).first(2)[1] != names.first(2)[1]
    assert BlockNames("v0", [3, 4], 2).first(1)[0] != names.first(2)[1], "the tokens before count"


def test_names_grow_with_the_tokens() -> None:
    tokens = [1, 2]
    names = BlockNames(None, tokens, 2)
    first = names.first(1)
    tokens += [3, 4]
    assert names.first(2) == BlockNames(None, [1, 2, 3, 4], 2).first(2)
    assert names.first(1) == first


LENT = frozenset(range(20, 24))


@dataclass
class Model:
    """Sequences of tokens below 3, one token a block, and what each block of the cache holds."""

    blocks: BlockManager = field(default_factory=lambda: BlockManager(12, 1))
    content: dict[int, tuple[int, ...]] = field(default_factory=dict)
    tables: list[tuple[BlockTable, tuple[int, ...]]] = field(default_factory=list)
    lent: bool = False

    def move(self) -> None:
        """Lend it blocks, or take them back, with the sequences that hold them."""
        if self.lent:
            for table, tokens in [one for one in self.tables if not LENT.isdisjoint(one[0])]:
                self.blocks.free(table)
                self.tables.remove((table, tokens))
            self.blocks.take_back(range(20, 24))
        else:
            self.blocks.lend(range(20, 24))
        self.lent = not self.lent

    def start(self, tokens: tuple[int, ...]) -> None:
        names = BlockNames(None, tokens, 1).first(len(tokens))
        found = self.blocks.start(len(tokens), names, 1)
        if found is None:
            return
        table, shared = found
        for i in range(shared):
            assert self.content[table[i]] == tokens[: i + 1]
        for i in range(shared, len(tokens)):
            self.content[table[i]] = tokens[: i + 1]
            self.blocks.name(table[i], names[i])
        self.tables.append((table, tokens))

    def finish(self, index: int, *, forget: bool) -> None:
        if self.tables:
            table, _ = self.tables.pop(index % len(self.tables))
            if forget:
                self.blocks.forget(table)
            self.blocks.free(table)


@settings(deadline=None)
@given(
    st.lists(
        st.lists(st.integers(0, 2), min_size=1, max_size=6).map(tuple)
        | st.tuples(st.integers(0, 12), st.sampled_from([False, False, True]))
        | st.just(()),
        max_size=80,
    )
)
def test_what_is_found_by_name_has_the_content_whatever_happened_before(
    plan: list[tuple[int, ...] | tuple[int, bool] | tuple[()]],
) -> None:
    model = Model()
    for step in plan:
        if not step:
            model.move()
        elif isinstance(step[-1], bool):
            model.finish(step[0], forget=step[-1])
        else:
            model.start(step)
        model.blocks.check([table for table, _ in model.tables])
        for table, tokens in model.tables:
            assert [model.content[block] for block in table] == [tokens[: i + 1] for i in range(len(tokens))]
