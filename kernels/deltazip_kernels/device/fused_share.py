"""Which part of a fused product each program does, and in what order.

Tiles are numbered so that those at work at the same time form a block about as high as it is wide: they read few rows
and few outputs between them, and the L2 has most of what they read.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

BAND = gl.constexpr(8)
"""Row tiles that are walked along together: eight of 256 rows by 16 blocks of 128 outputs occupy a GPU."""


@gluon.jit
def share_of(program, dealt, groups):
    """A program's units ``begin:end``, each 128 columns of a tile; those before ``middle`` are of shared tiles.

    ``dealt``: how many tiles there are, the programs that take part, and the tiles that they share evenly. The others
    they take whole, in turns.
    """
    tiles, programs, shared = dealt
    begin = program * shared * groups // programs
    middle = (program + 1) * shared * groups // programs
    end = middle + (tiles - shared - program + programs - 1) // programs * groups
    if program >= programs:
        middle = begin
        end = begin
    return begin, middle, end


@gluon.jit
def find_piece(at, middle, program, dealt, groups):
    """What a program does from its unit ``at`` on: a tile, its first group of columns, and the end of them."""
    _, programs, shared = dealt
    tile = at // groups
    first = at - tile * groups
    stop = groups
    if at >= middle:
        tile = shared + program + (at - middle) // groups * programs
        first = (at - middle) % groups
    elif first + middle - at < groups:
        stop = first + middle - at
    return tile, first, stop


@gluon.jit
def last_sharer(tile, dealt, groups):
    """The last of the programs that share a tile."""
    _, programs, shared = dealt
    return ((tile + 1) * groups * programs - 1) // (shared * groups)


@gluon.jit
def place(tile, height, width):
    """Row tile and block of outputs of a tile, of ``height`` times ``width``: down each band first, then along it."""
    bands = (height + BAND - 1) // BAND
    band = (height + bands - 1) // bands
    before = tile // (band * width) * band
    inside = tile - before * width
    if height - before < band:
        band = height - before
    block = inside // band
    return before + inside - block * band, block
