"""What every grouped kernel does first: find its rows, its linear and its delta."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def pointer(address, DTYPE: tl.constexpr):
    """An address from the table as a pointer whose alignment the compiler may count on."""
    return tl.multiple_of(address.to(tl.pointer_type(DTYPE)), 16)


@triton.jit
def wait(OVERLAP: tl.constexpr):
    """Until all launches ahead have ended and what they wrote can be read.

    With OVERLAP a kernel may start before that. Each of its programs waits, even one with nothing to do: then a launch
    that waits for this one has waited for all ahead of it.
    """
    if OVERLAP:
        gdc_wait()


@triton.jit
def let_next_start(OVERLAP: tl.constexpr):
    """The next launch, if it overlaps, may start when all programs have come here.

    Before :func:`wait` it may start while the launches ahead of this one still run: it must not read what they write
    before it has waited itself.
    """
    if OVERLAP:
        gdc_launch_dependents()


@triton.jit
def part_of(block, widths, tiles):
    """The part that block ``block`` of a row of stacked linears falls into: part, block in it, first column, width.

    ``widths[i]`` output columns belong to part ``i``, cut into ``tiles[i]`` blocks.
    """
    part = 0
    column = 0
    width = widths[0]
    for i in tl.static_range(1, len(widths)):
        if part == i - 1 and block >= tiles[i - 1]:
            part = i
            block -= tiles[i - 1]
            column += widths[i - 1]
            width = widths[i]
    return part, block, column, width


@triton.jit
def load_item(items):
    """This program's work item: slot (-1: nothing to do), first row, end row.

    Loads that do not depend on each other stand together here and in :func:`load_entry`: each wait for memory is a
    large part of a short launch. What they read stays in the L2 while weights pass through it.
    """
    item = items + tl.program_id(1) * 4
    return _kept(item), _kept(item + 1), _kept(item + 2)


@triton.jit
def load_entry(table, slot, part, parts):
    """A table entry: codec, then three addresses or numbers."""
    entry = table + (tl.maximum(slot, 0) * parts + part) * 4
    return _kept(entry), _kept(entry + 1), _kept(entry + 2), _kept(entry + 3)


@triton.jit
def _kept(at):
    return tl.load(at, eviction_policy="evict_last")


@triton.jit
def load_outputs(y, y_stride, m, n, live, inside):
    """[n, m] of ``y``, whose rows are ``m``."""
    at = y + m.to(tl.int64)[None, :] * y_stride + n[:, None]
    return tl.load(at, mask=live[None, :] & inside[:, None], other=0.0)


@triton.jit
def add_outputs(y, y_stride, m, n, live, inside, before, acc):
    """Store ``before + acc`` to [n, m] of ``y``: touched by this program alone."""
    at = y + m.to(tl.int64)[None, :] * y_stride + n[:, None]
    tl.store(at, (before.to(tl.float32) + acc).to(y.dtype.element_ty), mask=live[None, :] & inside[:, None])
