"""The kernel behind ``deltazip_kernels.gather``: rows of deltas are added to rows of an embedding."""

import triton
import triton.language as tl

from deltazip_kernels.device.dense import LOW_RANK, RAW
from deltazip_kernels.device.grouped import INT1, INT4, SPARSE2, unit
from deltazip_kernels.device.locate import load_entry, pointer
from deltazip_kernels.device.merge import columns, scale_place


@triton.jit
def _packed(
    out, codes, scales, extra, row, group, CODEC: tl.constexpr, ODD: tl.constexpr, GROUPS: tl.constexpr,
    K: tl.constexpr, PLAIN: tl.constexpr,
):  # fmt: skip
    """Add groups ``group`` [n] of row ``row``. ODD: they are the odd ones of their pairs."""
    LANES: tl.constexpr = 64 if CODEC == INT4 else 32
    SHARED: tl.constexpr = CODEC == INT1 or CODEC == SPARSE2
    PAIRS: tl.constexpr = (GROUPS + 1) // 2
    tile = (row >> 6).to(tl.int64)
    r = row & 63
    inside = group < GROUPS
    known = tl.minimum(group, GROUPS - 1)
    shared = ((tile * PAIRS + (known >> 1)) * 64 + r)[:, None] * 32 + tl.arange(0, 32)[None, :]
    own = ((tile * GROUPS + known) * 64 + r)[:, None] * LANES + tl.arange(0, 32)[None, :]
    levels = columns(codes + (shared if SHARED else own), extra + shared, CODEC, ODD, PLAIN).to(tl.float32)
    scale = tl.load(scales + (tile * GROUPS + known) * 64 + scale_place(r)).to(tl.float32) * (1.0 / unit(CODEC))
    k = group[:, None] * 128 + tl.arange(0, 128)[None, :]
    _add(out, k, levels * scale[:, None], inside[:, None] & (k < K))


@triton.jit
def _add(out, k, values, inside):
    before = tl.load(out + k, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + k, (before + values).to(out.dtype.element_ty), mask=inside)


@triton.jit
def gather(
    out,
    out_stride,
    chosen,
    which,
    table,
    N,
    K: tl.constexpr,
    DTYPE: tl.constexpr,
    CODECS: tl.constexpr,
    PAIRS: tl.constexpr,
    PLAIN: tl.constexpr,
):
    """Add row ``chosen[t]`` of the delta in slot ``which[t] - 1`` to row ``t`` of ``out``."""
    GROUPS: tl.constexpr = (K + 127) // 128
    t = tl.program_id(0).to(tl.int64)
    row = tl.load(chosen + t)
    slot = tl.load(which + t) - 1
    codec, codes, scales, extra = load_entry(table, slot, 0, 1)
    if slot < 0 or row >= N:
        return
    out += t * out_stride
    pair = tl.program_id(1) * PAIRS + tl.arange(0, PAIRS)
    k = tl.program_id(1) * (PAIRS * 256) + tl.arange(0, PAIRS * 256)
    for i in tl.static_range(0, len(CODECS)):
        if codec == CODECS[i]:
            if CODECS[i] == RAW:
                values = tl.load(pointer(codes, DTYPE) + row * K + k, mask=k < K, other=0.0)
                _add(out, k, values.to(tl.float32), k < K)
            elif CODECS[i] == LOW_RANK:
                total = tl.zeros((PAIRS * 256,), dtype=tl.float32)
                for r in range(extra):
                    up = tl.load(pointer(scales, DTYPE) + row * extra + r).to(tl.float32)
                    total += up * tl.load(pointer(codes, DTYPE) + r * K + k, mask=k < K, other=0.0).to(tl.float32)
                _add(out, k, total, k < K)
            else:
                _packed(out, pointer(codes, tl.uint8), pointer(scales, tl.bfloat16), pointer(extra, tl.uint8), row,
                        2 * pair, CODECS[i], False, GROUPS, K, PLAIN)  # fmt: skip
                _packed(out, pointer(codes, tl.uint8), pointer(scales, tl.bfloat16), pointer(extra, tl.uint8), row,
                        2 * pair + 1, CODECS[i], True, GROUPS, K, PLAIN)  # fmt: skip
