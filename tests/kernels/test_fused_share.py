"""Who does which part of a fused product: plain arithmetic, the same functions that run on the GPU."""

from collections import Counter

import pytest

from deltazip_kernels.device import fused_share
from deltazip_kernels.device.fused_share import find_piece, kinds_of, last_sharer, place, share_of
from deltazip_kernels.fused import deal

PROGRAMS = 132


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the functions below call is as plain as they are."""
    monkeypatch.setattr(fused_share, "_reached", fused_share._reached.fn)


def pieces(tall: int, low: int, groups: int) -> list[list[list[tuple[int, int, int]]]]:
    """For both kinds of tiles, what each program does of them: tile, first group and end."""
    kinds = kinds_of.fn(tall, low, groups, *deal(tall, low, groups, PROGRAMS))
    return [[pieces_of(program, kind, groups) for program in range(PROGRAMS)] for kind in kinds]


def pieces_of(program: int, kind: tuple[int, ...], groups: int) -> list[tuple[int, int, int]]:
    at, middle, end = share_of.fn(program, kind, groups)
    found = []
    while at < end:
        tile, first, stop = find_piece.fn(at, middle, program, kind, groups)
        found.append((tile, first, stop))
        at += stop - first
    assert at == end
    return found


COUNTS = [
    (0, 1),
    (1, 0),
    (2, 3),
    (63, 0),
    (64, 32),
    (0, 96),
    (97, 0),
    (132, 1),
    (133, 0),
    (200, 131),
    (448, 0),
    (1001, 300),
]


@pytest.mark.parametrize(("tall", "low"), COUNTS)
@pytest.mark.parametrize("groups", [1, 2, 32])
def test_every_group_of_every_tile_is_done_once(tall: int, low: int, groups: int) -> None:
    kinds = pieces(tall, low, groups)
    for tiles, shares in zip((tall, low), kinds, strict=True):
        done = sorted((tile, k) for share in shares for tile, first, stop in share for k in range(first, stop))
        assert done == [(tile, k) for tile in range(tiles) for k in range(groups)]


@pytest.mark.parametrize(("tall", "low"), [(63, 0), (64, 32), (0, 96), (97, 0), (200, 131), (448, 0), (1001, 300)])
def test_programs_have_even_shares(tall: int, low: int) -> None:
    done = [[sum(stop - first for _, first, stop in share) for share in shares] for shares in pieces(tall, low, 32)]
    work = [3 * of_tall + 2 * of_low for of_tall, of_low in zip(*done, strict=True)]
    assert max(work) <= 1.12 * (3 * tall + 2 * low) * 32 / PROGRAMS + 3


@pytest.mark.parametrize(("tall", "low"), [(64, 0), (96, 0), (144, 0), (64, 32), (96, 48)])
def test_tiles_are_shared_by_few_programs_at_few_places(tall: int, low: int) -> None:
    for shares in pieces(tall, low, 32):
        parts = [piece for share in shares for piece in share]
        assert len({first for _, first, _ in parts}) <= 8
        assert max(Counter(tile for tile, _, _ in parts).values(), default=0) <= 4


@pytest.mark.parametrize(("tall", "low"), COUNTS)
def test_parts_are_left_first_and_collected_from_all_sharers(tall: int, low: int) -> None:
    kinds = kinds_of.fn(tall, low, 32, *deal(tall, low, 32, PROGRAMS))
    for kind, shares in zip(kinds, pieces(tall, low, 32), strict=True):
        for program, share in enumerate(shares):
            assert all(first == 0 for _, first, _ in share[1:])
            for tile, first, stop in share:
                if first == 0 and stop < 32:
                    sharers = [other for other in range(PROGRAMS) if any(piece[0] == tile for piece in shares[other])]
                    assert sharers == list(range(program, last_sharer.fn(tile, kind, 32) + 1))


@pytest.mark.parametrize(("height", "width"), [(1, 5), (8, 32), (9, 224), (32, 48)])
def test_tiles_lie_at_different_places_and_neighbours_close_together(height: int, width: int) -> None:
    at = [place.fn(tile, height, width) for tile in range(height * width)]
    assert sorted(at) == [(row, block) for row in range(height) for block in range(width)]
    for wave in range(0, height * width - PROGRAMS, PROGRAMS):
        rows, blocks = zip(*at[wave : wave + PROGRAMS], strict=True)
        assert len(set(rows)) <= 2 * min(height, 8)
        assert len(set(blocks)) <= 2 + 2 * PROGRAMS // min(height, 5)
