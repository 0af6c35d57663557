"""Who does which part of a fused product: plain arithmetic, the same functions that run on the GPU."""

import pytest

from deltazip_kernels.device.fused_share import find_piece, last_sharer, place, share_of
from deltazip_kernels.fused import deal

PROGRAMS = 132


def pieces(program: int, dealt: tuple[int, int, int], groups: int) -> list[tuple[int, int, int]]:
    at, middle, end = share_of.fn(program, dealt, groups)
    found = []
    while at < end:
        tile, first, stop = find_piece.fn(at, middle, program, dealt, groups)
        found.append((tile, first, stop))
        at += stop - first
    assert at == end
    return found


@pytest.mark.parametrize("tiles", [0, 1, 2, 63, 64, 96, 97, 132, 133, 200, 448, 1001])
@pytest.mark.parametrize("groups", [1, 2, 32])
def test_every_group_of_every_tile_is_done_once(tiles: int, groups: int) -> None:
    dealt = (tiles, *deal(tiles, groups, PROGRAMS))
    shares = [pieces(program, dealt, groups) for program in range(PROGRAMS)]
    done = sorted((tile, k) for share in shares for tile, first, stop in share for k in range(first, stop))
    assert done == [(tile, k) for tile in range(tiles) for k in range(groups)]
    sizes = [sum(stop - first for _, first, stop in share) for share in shares if share]
    assert max(sizes, default=0) <= 1.12 * tiles * groups / PROGRAMS + groups * (tiles > PROGRAMS) + 1


@pytest.mark.parametrize("tiles", [1, 64, 96, 97, 133, 265, 448])
def test_parts_are_left_first_and_collected_from_all_sharers(tiles: int) -> None:
    dealt = (tiles, *deal(tiles, 32, PROGRAMS))
    shares = [pieces(program, dealt, 32) for program in range(PROGRAMS)]
    for program, share in enumerate(shares):
        assert all(first == 0 for _, first, _ in share[1:])
        for tile, first, stop in share:
            if first == 0 and stop < 32:
                sharers = [other for other in range(PROGRAMS) if any(piece[0] == tile for piece in shares[other])]
                assert sharers == list(range(program, last_sharer.fn(tile, dealt, 32) + 1))


@pytest.mark.parametrize(("height", "width"), [(1, 5), (8, 32), (9, 224), (32, 48)])
def test_tiles_lie_at_different_places_and_neighbours_close_together(height: int, width: int) -> None:
    at = [place.fn(tile, height, width) for tile in range(height * width)]
    assert sorted(at) == [(row, block) for row in range(height) for block in range(width)]
    for wave in range(0, height * width - PROGRAMS, PROGRAMS):
        rows, blocks = zip(*at[wave : wave + PROGRAMS], strict=True)
        assert len(set(rows)) <= 2 * min(height, 8)
        assert len(set(blocks)) <= 2 + 2 * PROGRAMS // min(height, 5)
