"""What every grouped kernel does first: find its rows, its linear and its delta, and wait for launches ahead."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def pointer(address, DTYPE: tl.constexpr):
    """An address from the table as a pointer, which the compiler may take as aligned to 16 bytes."""
    return tl.multiple_of(address.to(tl.pointer_type(DTYPE)), 16)


@triton.jit
def wait(OVERLAP: tl.constexpr):
    """Wait until all launches ahead have ended, so that what they wrote can be read.

    With OVERLAP a kernel may start before that. Each of its programs has to wait, even one with nothing to do: only
    then has a launch that waits for this one waited for all ahead of it.
    """
    if OVERLAP:
        gdc_wait()


@triton.jit
def let_next_start(OVERLAP: tl.constexpr):
    """Let the next launch start, if it overlaps, once all programs have called this.

    If that is before :func:`wait`, the next launch may start while those ahead of this one still run.
    """
    if OVERLAP:
        gdc_launch_dependents()


@triton.jit
def part_of(block, widths, tiles):
    """The part of a stack that block ``block`` of its outputs belongs to: part, block in it, first column, width.

    Part ``i`` has ``widths[i]`` output columns, cut into ``tiles[i]`` blocks.
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

    Here and in :func:`load_entry`, independent loads are issued together, as every wait for memory is a large part of a
    short launch. What they read is kept in the L2 while weights pass through it.
    """
    item = items + tl.program_id(1) * 4
    return _kept(item), _kept(item + 1), _kept(item + 2)


@triton.jit
def load_entry(table, slot, part, parts):
    """An entry of a ``DeltaTable``: codec, then three addresses or numbers."""
    entry = table + (tl.maximum(slot, 0) * parts + part) * 4
    return _kept(entry), _kept(entry + 1), _kept(entry + 2), _kept(entry + 3)


@triton.jit
def _kept(at):
    return tl.load(at, eviction_policy="evict_last")


@triton.jit
def load_outputs(y, y_stride, m, n, live, inside):
    """Rows ``m`` and columns ``n`` of ``y``, as [n, m]."""
    at = y + m.to(tl.int64)[None, :] * y_stride + n[:, None]
    return tl.load(at, mask=live[None, :] & inside[:, None], other=0.0)


@triton.jit
def add_outputs(y, y_stride, m, n, live, inside, before, acc):
    """Store ``before + acc`` [n, m] to rows ``m`` and columns ``n`` of ``y``, which only this program writes."""
    at = y + m.to(tl.int64)[None, :] * y_stride + n[:, None]
    tl.store(at, (before.to(tl.float32) + acc).to(y.dtype.element_ty), mask=live[None, :] & inside[:, None])
