"""The left operand of a fused product: tiles of the base with the delta added, in the registers of ``wgmma``."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from deltazip_kernels.device.grouped import INT4

BN = gl.constexpr(128)
"""Outputs of a tile: two row tiles of the packed layout."""
BK = gl.constexpr(64)
"""Columns of a step, half a group."""

# Where a thread holds the left operand [outputs, 16 columns of one instruction each, those columns] ...
OPERAND = gl.constexpr(
    gl.DistributedLinearLayout(
        reg_bases=[[0, 0, 1], [8, 0, 0], [0, 0, 8], [0, 1, 0], [0, 2, 0]],
        lane_bases=[[0, 0, 2], [0, 0, 4], [1, 0, 0], [2, 0, 0], [4, 0, 0]],
        warp_bases=[[16, 0, 0], [32, 0, 0], [64, 0, 0]],
        block_bases=[],
        shape=[128, 4, 16],
    )
)
# ... and the words of codes [outputs, words] that it needs for that, in the order that makes for 16-byte loads.
WORDS = gl.constexpr(
    gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [0, 2], [8, 0]],
        lane_bases=[[0, 0], [0, 0], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[16, 0], [32, 0], [64, 0]],
        block_bases=[],
        shape=[128, 4],
    )
)


def _add_int2() -> str:
    """$0..$3 = $4..$7, pairs of the base's weights, plus the delta: columns c, c + 1 of rows r and r + 8, then c + 8,
    c + 9. Words of codes are in $8 and $10, pairs of scales in $16 and $18; $24 rotates the code of c to bit 1.

    A code and half a step below it become the mantissa of 128 + x, the right one of a pair four times as large.
    """
    text = "{\n.reg .b32 v, p, bias;\nmov.b32 bias, 0xC310C304;\n"  # -144, -132
    for row in range(2):
        text += f"shf.r.wrap.b32 v, ${8 + 2 * row}, ${8 + 2 * row}, $24;\n"
        for half in range(2):
            pair = row + 2 * half
            text += f"prmt.b32 p, v, 0, {'0x3232' if half else '0x1010'};\n"
            text += "lop3.b32 p, p, 0x00180006, 0x43144305, 0x6A;\n"  # (p & mask) ^ bits
            text += "add.rn.bf16x2 p, p, bias;\n"
            text += f"fma.rn.bf16x2 ${pair}, p, ${16 + 2 * row}, ${4 + pair};\n"
    return text + "}"


def _add_int4() -> str:
    """Likewise; columns c in words of $8 and $10, c + 1 in $16 and $18, scales in $24 and $26. $40 selects the bytes of
    both that hold the codes, which $32 shifts to bit 0.
    """
    text = "{\n.reg .b32 v, p, bias;\nmov.b32 bias, 0xC308C308;\n"  # -136 twice
    for row in range(2):
        text += f"prmt.b32 v, ${8 + 2 * row}, ${16 + 2 * row}, $40;\nshr.b32 v, v, $32;\n"
        text += "lop3.b32 v, v, 0x0F0F0F0F, 0x08080808, 0x6A;\n"  # (v & mask) ^ bits
        for half in range(2):
            pair = row + 2 * half
            text += f"prmt.b32 p, v, 0x43434343, {'0x4342' if half else '0x4140'};\n"
            text += "add.rn.bf16x2 p, p, bias;\n"
            text += f"fma.rn.bf16x2 ${pair}, p, ${24 + 2 * row}, ${4 + pair};\n"
    return text + "}"


ADD_INT2 = gl.constexpr(_add_int2())
ADD_INT4 = gl.constexpr(_add_int4())
INT2_OPERANDS = gl.constexpr(",".join(["=&r"] * 4 + ["r"] * 28))
INT4_OPERANDS = gl.constexpr(",".join(["=&r"] * 4 + ["r"] * 44))
TWICE = gl.constexpr("prmt.b32 $0, $1, 0, 0x1010;")
# Times a half and an eighth: what an int2 code's bits are worth in the left and the right of a pair.
HALVED = gl.constexpr(
    "{\n.reg .b32 k;\nmov.b32 k, 0x3E003F00;\nprmt.b32 $0, $1, 0, 0x1010;\nmul.rn.bf16x2 $0, $0, k;\n}"
)


@gluon.jit
def point(block, group, codes, scales, K, LANES: gl.constexpr):
    """Pointers [128, 4] to the first words and [128] to the scales of a tile's rows in ``group``."""
    r = gl.arange(0, BN, gl.SliceLayout(1, WORDS))
    word = gl.arange(0, 4, gl.SliceLayout(0, WORDS))
    inside = r & 63
    first = (block * 2 + (r >> 6)).to(gl.int64) * (K // 2) + group * 64  # 64 rows of K / 128 groups in a row tile
    words = codes + (first * (LANES // 4) + inside * (LANES // 4))[:, None] + word[None, :]
    return words, scales + first + ((inside >> 4) * 16 + (inside & 7) * 2 + ((inside >> 3) & 1))


@gluon.jit
def load_words(words, CODEC: gl.constexpr):
    """A step's words of codes; for int4, those of the left columns of pairs, and those of the right ones."""
    left = gl.load(words)
    right = left
    if CODEC == INT4:
        right = gl.load(words + 8)
    return left, right


@gluon.jit
def pair_of_scales(scale, CODEC: gl.constexpr):
    """The factors of both codes of a pair, as two bf16 in an int32 [128]."""
    bits = scale.to(gl.int16, bitcast=True).to(gl.int32)
    CODE: gl.constexpr = TWICE if CODEC == INT4 else HALVED
    return gl.inline_asm_elementwise(CODE, "=r,r", [bits], dtype=gl.int32, is_pure=True, pack=1)


@gluon.jit
def merge(base, words, more, scale, LAYOUT: gl.constexpr, CODEC: gl.constexpr):
    """The left operand of one step [128, 64]: ``base``, in shared memory, plus the delta, rounded once."""
    BY_WORD: gl.constexpr = gl.SliceLayout(2, OPERAND)
    weight = gl.convert_layout(gl.reshape(base.load(LAYOUT), [BN, 4, 16]), OPERAND, assert_trivial=True)
    words = gl.convert_layout(words, BY_WORD)[:, :, None]
    scale = gl.convert_layout(scale, gl.SliceLayout(1, BY_WORD))[:, None, None]
    column = gl.arange(0, 16, gl.SliceLayout(0, gl.SliceLayout(1, OPERAND)))
    pair = ((column // 2) % 4)[None, None, :]
    if CODEC == INT4:
        more = gl.convert_layout(more, BY_WORD)[:, :, None]
        inputs = [weight, words, more, scale, pair % 2 * 4, pair // 2 * 0x1111 + 0x6240]
        weight = gl.inline_asm_elementwise(ADD_INT4, INT4_OPERANDS, inputs, dtype=gl.bfloat16, is_pure=True, pack=8)
    else:
        inputs = [weight, words, scale, (pair * 4 + 31) % 32]
        weight = gl.inline_asm_elementwise(ADD_INT2, INT2_OPERANDS, inputs, dtype=gl.bfloat16, is_pure=True, pack=8)
    return gl.convert_layout(gl.reshape(weight, [BN, BK]), LAYOUT, assert_trivial=True)
