"""The kernel behind ``deltazip_kernels.skinny``: a GEMM for so few rows that it only has to read the weight fast.

A program multiplies BN rows of the weight, or a part of their columns, with all rows of the activations. The weight is
the left operand of the tensor cores, which want 64 rows there.

With ADD, the launch ahead is a product with deltas. That lets this one start only after it has waited itself, so the
activations are complete, and only its result, in ``deltas``, has to be waited for.
"""

import triton
import triton.language as tl

from deltazip_kernels.device.locate import let_next_start, wait


@triton.jit
def _store(
    y, y_stride, deltas, x_scales, w_scales, n, m, live, acc, SCALED: tl.constexpr, ADD: tl.constexpr
):  # fmt: skip
    if SCALED:
        acc = acc * tl.load(w_scales + n)[:, None] * tl.load(x_scales + m, mask=live, other=0.0)[None, :]
    if ADD:
        there = deltas + m[None, :] * (tl.num_programs(0) * n.shape[0]) + n[:, None]
        acc += tl.load(there, mask=live[None, :], other=0.0)
        tl.debug_barrier()  # a thread may clear what another one reads
        tl.store(there, tl.zeros(acc.shape, deltas.dtype.element_ty), mask=live[None, :])
    tl.store(y + m.to(tl.int64)[None, :] * y_stride + n[:, None], acc.to(y.dtype.element_ty), mask=live[None, :])


@triton.jit(do_not_specialize=["M"])  # one kernel for all numbers of rows
def skinny(
    y,
    y_stride,
    x,
    x_stride,
    x_scales,
    w,
    w_scales,
    partials,
    arrived,
    deltas,
    M,
    K,
    STEPS,
    SPLIT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    STAGES: tl.constexpr,
    SCALED: tl.constexpr,
    ADD: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """``y`` [M, N] = ``x`` [M, K] ``w`` [N, K] transposed, with SCALED times ``x_scales`` [M] and ``w_scales`` [N].

    ADD adds ``deltas`` [M, N] and sets it to zero.
    K is split into SPLIT parts of STEPS * BK columns. The last program of a tile to arrive adds up the parts in a fixed
    order, so that the sum does not depend on which one that is, and sets the tile's ``arrived`` back to zero.
    """
    block = tl.program_id(0)
    part = tl.program_id(1)
    n = block * BN + tl.arange(0, BN)
    m = tl.arange(0, BM)
    live = m < M
    begin = part * STEPS * BK
    k = tl.arange(0, BK)
    w_tile = w + begin + n.to(tl.int64)[:, None] * K + k[None, :]
    if not ADD:
        wait(OVERLAP)
    x_tile = x + begin + m.to(tl.int64)[None, :] * x_stride + k[:, None]
    acc = tl.zeros((BN, BM), dtype=tl.float32)
    for _ in tl.range(0, STEPS, num_stages=STAGES):
        left = tl.load(w_tile)
        right = tl.load(x_tile, mask=live[None, :], other=0.0)
        # The tensor cores add up fp8 products in fewer bits than float32 has: not beyond one step.
        acc = tl.dot(left, right, acc, max_num_imprecise_acc=BK) if SCALED else tl.dot(left, right, acc)
        w_tile += BK
        x_tile += BK
    let_next_start(OVERLAP)
    if SPLIT == 1:
        if ADD:
            wait(OVERLAP)
        _store(y, y_stride, deltas, x_scales, w_scales, n, m, live, acc, SCALED, ADD)
        return
    at = tl.arange(0, BN)[:, None] * BM + m[None, :]
    tiles = partials + block * (SPLIT * BN * BM) + at
    tl.store(tiles + part * (BN * BM), acc)  # padding rows too: a mask would break up stores of 16 bytes
    if ADD:
        wait(OVERLAP)
    tl.debug_barrier()  # all threads must have stored before one of them counts the program
    if tl.atomic_add(arrived + block, 1, sem="acq_rel") == SPLIT - 1:
        total = tl.zeros((BN, BM), dtype=tl.float32)
        for i in tl.static_range(0, SPLIT):
            total += tl.load(tiles + i * (BN * BM), cache_modifier=".cg")
        tl.store(arrived + block, 0)
        _store(y, y_stride, deltas, x_scales, w_scales, n, m, live, total, SCALED, ADD)
