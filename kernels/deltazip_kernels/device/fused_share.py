"""Which part of a fused product each program does, and in what order.

Tiles are numbered so that those that run at the same time form a block about as high as it is wide. Together they read
few rows and few outputs, most of them from the L2.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

TALL_COST, LOW_COST = gl.constexpr(3), gl.constexpr(2)
"""Relative costs of the same columns of a tile with 256 rows, and of one with 128."""
BAND = gl.constexpr(8)
"""The height of a band of tiles: eight row tiles of 256 rows by 16 blocks of 128 outputs occupy a GPU."""


@gluon.jit
def kinds_of(tall, low, groups, programs, tall_shared, low_shared):
    """How each kind of tiles is dealt out: (tiles, shared ones, where these begin in a line of all shared work, cost of
    a group, length of that line, programs)."""
    before = tall_shared * groups * TALL_COST
    line = before + low_shared * groups * LOW_COST
    return (
        (tall, tall_shared, 0, TALL_COST, line, programs),
        (low, low_shared, before, LOW_COST, line, programs),
    )


@gluon.jit
def _reached(program, kind, groups):
    """The number of groups of a kind's shared tiles that belong to programs before this one."""
    _, shared, before, cost, line, programs = kind
    at = (program * line // programs - before) // cost
    if at < 0:
        at = 0
    if at > shared * groups:
        at = shared * groups
    return at


@gluon.jit
def share_of(program, kind, groups):
    """A program's units of work ``begin:end``; a unit is a group of columns of a tile. Those before ``middle`` are of
    shared tiles, of which every program has an even share; all other tiles are taken whole, in turns."""
    tiles, shared, _, _, _, programs = kind
    begin = _reached(program, kind, groups)
    middle = _reached(program + 1, kind, groups)
    end = middle + (tiles - shared - program + programs - 1) // programs * groups
    if program >= programs:
        end = begin
    return begin, middle, end


@gluon.jit
def find_piece(at, middle, program, kind, groups):
    """What a program does from its unit ``at`` on: a tile, its first group of columns, and their end."""
    _, shared, _, _, _, programs = kind
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
def last_sharer(tile, kind, groups):
    """The last of the programs that share a tile."""
    _, _, before, cost, line, programs = kind
    return ((before + (tile + 1) * groups * cost) * programs - 1) // line


@gluon.jit
def place(tile, height, width):
    """Row tile and block of outputs of a tile, of ``height`` by ``width``. They are numbered down bands, then along."""
    bands = (height + BAND - 1) // BAND
    band = (height + bands - 1) // bands
    before = tile // (band * width) * band
    inside = tile - before * width
    if height - before < band:
        band = height - before
    block = inside // band
    return before + inside - block * band, block
