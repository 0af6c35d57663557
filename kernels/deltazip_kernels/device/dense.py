"""The grouped product over deltas that are not packed: raw matrices, and low-rank pairs."""

import triton
import triton.language as tl

from deltazip_kernels.device.locate import (
    add_outputs,
    let_next_start,
    load_entry,
    load_item,
    load_outputs,
    part_of,
    pointer,
    wait,
)

# The ids of ``table.CODEC_IDS``.
RAW = tl.constexpr(7)
LOW_RANK = tl.constexpr(8)


@triton.jit
def _operand(a, PLAIN: tl.constexpr):
    """Triton's interpreter multiplies no bfloat16."""
    if PLAIN:
        a = a.to(tl.float32)
    return a


@triton.jit
def _walk(
    w,
    w_rows,
    x,
    x_stride,
    m,
    live,
    begin,
    stop,
    K,
    BN: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    PLAIN: tl.constexpr,
):
    """The product of rows ``w`` with rows ``m`` of x over columns ``begin:stop``, float32 [BN, BM].

    ``w_rows`` and ``live`` say which of them exist.
    """
    k = begin + tl.arange(0, BK)
    w += k[None, :]
    xp = x + m.to(tl.int64)[None, :] * x_stride + k[:, None]
    acc = tl.zeros((BN, BM), dtype=tl.float32)
    for at in tl.range(begin, stop, BK):
        inside = at + tl.arange(0, BK) < K
        a = tl.load(w, mask=w_rows[:, None] & inside[None, :], other=0.0).to(x.dtype.element_ty)
        b = tl.load(xp, mask=live[None, :] & inside[:, None], other=0.0)
        acc = tl.dot(_operand(a, PLAIN), _operand(b, PLAIN), acc, input_precision="ieee")
        w += BK
        xp += BK
    return acc


@triton.jit
def raw(
    y,
    y_stride,
    x,
    x_stride,
    items,
    table,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    TILES: tl.constexpr,
    DTYPE: tl.constexpr,
    BN: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    PLAIN: tl.constexpr,
):
    """Add the products with raw deltas [N, K] in DTYPE to ``y``."""
    slot, first, end = load_item(items)
    part, block, column, width = part_of(tl.program_id(0), ROWS, TILES)
    codec, values, _, _ = load_entry(table, slot, part, len(ROWS))
    if slot < 0 or codec != RAW:
        return
    n = block * BN + tl.arange(0, BN)
    m = first + tl.arange(0, BM)
    live = m < end
    before = load_outputs(y, y_stride, m, column + n, live, n < width)
    w = pointer(values, DTYPE) + n.to(tl.int64)[:, None] * K
    acc = _walk(w, n < width, x, x_stride, m, live, 0, K, K, BN, BM, BK, PLAIN)
    add_outputs(y, y_stride, m, column + n, live, n < width, before, acc)


@triton.jit
def _bring(rows, K, begin, CHUNK: tl.constexpr):
    """Prefetch columns ``begin:begin + CHUNK`` of ``rows``, which are pointers to their starts, to the L2."""
    LINE: tl.constexpr = 128 // (rows.dtype.element_ty.primitive_bitwidth // 8)
    k = tl.minimum(begin + tl.arange(0, CHUNK // LINE) * LINE, K - 1)
    lines = (rows[:, None] + k[None, :]).to(tl.int64)
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1];\nmov.b32 $0, 0;", "=r,l", [lines], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit(do_not_specialize=["T"])
def shrink(
    inner,
    T,
    x,
    x_stride,
    items,
    table,
    K: tl.constexpr,
    PARTS: tl.constexpr,
    CHUNK: tl.constexpr,
    DTYPE: tl.constexpr,
    R: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    PLAIN: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Write ``x @ down.T`` of each chunk of K to ``inner`` [parts, chunks, T, R] float32, zero beyond a delta's rank.

    Weights are prefetched to the L2 while the launches ahead end.
    """
    slot, first, end = load_item(items)
    part = tl.program_id(0) % PARTS
    chunk = tl.program_id(0) // PARTS
    codec, down, _, rank = load_entry(table, slot, part, PARTS)
    if slot < 0 or codec != LOW_RANK:
        end = first
    r = tl.arange(0, R)
    begin = chunk * CHUNK
    w = pointer(down, DTYPE)
    if OVERLAP:
        if first < end:
            _bring(w + tl.minimum(r, rank - 1) * K, K, begin, CHUNK)
    wait(OVERLAP)
    let_next_start(OVERLAP)
    chunks = tl.num_programs(0) // PARTS
    out = inner + (part * chunks + chunk) * T * R + r[:, None]
    for at in tl.range(first, end, BM, num_stages=1):
        m = at + tl.arange(0, BM)
        live = m < end
        acc = _walk(
            w + r[:, None] * K, r < rank, x, x_stride, m, live,
            begin, tl.minimum(begin + CHUNK, K), K, R, BM, BK, PLAIN,
        )  # fmt: skip
        tl.store(out + m.to(tl.int64)[None, :] * R, acc, mask=live[None, :])


@triton.jit
def _rows(w, n, N, r, rank):
    """Rows ``n`` and columns ``r`` of ``w`` [N, rank], zero where it has none."""
    wanted = (n < N)[:, None] & (r < rank)[None, :]
    return tl.load(w + n.to(tl.int64)[:, None] * rank + r[None, :], mask=wanted, other=0.0)


@triton.jit(do_not_specialize=["T"])
def expand(
    y,
    y_stride,
    inner,
    T,
    items,
    table,
    ROWS: tl.constexpr,
    TILES: tl.constexpr,
    CHUNKS: tl.constexpr,
    DTYPE: tl.constexpr,
    R: tl.constexpr,
    BN: tl.constexpr,
    BM: tl.constexpr,
    PLAIN: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Add ``(sum of inner's chunks) @ up.T`` to ``y``. The sum is rounded to DTYPE first, as a linear's output is.

    Weights are read before :func:`shrink`, the launch ahead, has ended: it does not write them.
    """
    slot, first, end = load_item(items)
    part, block, column, width = part_of(tl.program_id(0), ROWS, TILES)
    codec, _, up, rank = load_entry(table, slot, part, len(ROWS))
    if slot < 0 or codec != LOW_RANK:
        end = first
    n = block * BN + tl.arange(0, BN)
    r = tl.arange(0, R)
    w = tl.zeros((BN, R), dtype=DTYPE)
    if first < end:
        if rank % 8 == 0:  # tells the compiler that it can read 16 bytes at once
            w = _rows(pointer(up, DTYPE), n, width, r, rank >> 3 << 3)
        else:
            w = _rows(pointer(up, DTYPE), n, width, r, rank)
    wait(OVERLAP)
    let_next_start(OVERLAP)
    for at in tl.range(first, end, BM, num_stages=1):
        m = at + tl.arange(0, BM)
        live = m < end
        before = load_outputs(y, y_stride, m, column + n, live, n < width)
        t = tl.zeros((BM, R), dtype=tl.float32)
        for i in tl.static_range(0, CHUNKS):  # unrolled: the loads go out together
            chunk = inner + (part * CHUNKS + i) * T * R + m.to(tl.int64)[:, None] * R + r[None, :]
            t += tl.load(chunk, mask=live[:, None], other=0.0)
        acc = tl.dot(_operand(w, PLAIN), _operand(tl.trans(t.to(DTYPE)), PLAIN), input_precision="ieee")
        add_outputs(y, y_stride, m, column + n, live, n < width, before, acc)
