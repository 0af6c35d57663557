"""From packed bytes to int8 operands of the tensor cores, four codes in one 32-bit register.

The unpackers take the lanes of one group, bytes [n, 32] (int4: [n, 64]). Where two groups share a byte, ODD selects the
upper half. They return planes of int8, ``(code - zero) * 2**(8 - bits)``; ``docs/layout.md`` draws lanes and planes.
PLAIN selects arithmetic on single bytes instead of inline assembly, for Triton's interpreter.
"""

from collections.abc import Sequence

import triton
import triton.language as tl


def _move(target: str, source: str, left: int) -> str:
    """Shift left by ``left`` bits, or right if negative. Bits that cross into another byte are masked later."""
    return f"{'shl' if left >= 0 else 'shr'}.b32 {target}, {source}, {abs(left)};"


def _take(target: str, source: str, first: int, bits: int, below: str) -> str:
    """Move the ``bits`` bits at bit ``first`` of each byte to the top of the byte, and put ``below`` under them."""
    mask = "0x" + f"{0x100 - (1 << (8 - bits)):02X}" * 4
    left = 8 - bits - first
    shift = _move(target, source, left) if left else f"mov.b32 {target}, {source};"
    return f"{shift}\nlop3.b32 {target}, {target}, {mask}, {below}, 0xEA;\n"  # (a & b) | c


def _dense(bits: int, first: int, outputs: Sequence[str], below: Sequence[str]) -> str:
    return "".join(_take(out, "c", first + bits * i, bits, below[i]) for i, out in enumerate(outputs))


def _choose(odd: bool) -> str:
    """Planes $0..$3 from the kept pair ``a`` (left), ``b`` (right) and the bitmap ``i``."""
    # A byte's mask is its top bit, spread by prmt: a selector nibble of 8 + n repeats the sign of byte n.
    masks = "".join(f"{_move(f'm{p}', 'i', 7 - p - 4 * odd)}\nprmt.b32 m{p}, m{p}, 0, 0xBA98;\n" for p in range(4))
    return masks + (
        "and.b32 $0, m0, a;\n"
        "lop3.b32 t, b, m0, a, 0xE2;\n"  # m0 ? b : a
        "and.b32 $1, m1, t;\n"
        "lop3.b32 t, a, m3, b, 0xE2;\n"  # m3 ? a : b
        "and.b32 $2, m2, t;\n"
        "and.b32 $3, m3, b;\n"
    )


def _asm(registers: str, inputs: str, body: str) -> tl.constexpr:
    return tl.constexpr("{\n.reg .b32 " + registers + ";\n" + inputs + body + "}")


_OUT = ("$0", "$1", "$2", "$3")
_HALF2, _HALF1, _HALF3 = "0x20202020", "0x40404040", "0x10101010"
_ONE, _TWO = "mov.b32 c, $4;\n", "mov.b32 c, $4;\nmov.b32 i, $5;\n"


def _int3(odd: bool) -> str:
    """Move the lowest bit of plane ``p``, bit ``p`` of each half byte of ``i``, to bit 5, and put the upper two bits
    above it."""
    low = "".join(
        f"{_move(f'm{p}', 'i', 5 - p - 4 * odd)}\nlop3.b32 m{p}, m{p}, 0x20202020, {_HALF3}, 0xEA;\n" for p in range(4)
    )
    return low + _dense(2, 0, _OUT, ("m0", "m1", "m2", "m3"))


def _sparse(bits: int, odd: bool) -> str:
    first, below = (0, "0") if bits == 4 else (4 * odd, _HALF2)
    return _dense(bits, first, ("a", "b"), (below, below)) + _choose(odd)


_INT4 = tl.constexpr("shl.b32 $0, $2, 4;\nand.b32 $0, $0, 0xF0F0F0F0;\nand.b32 $1, $2, 0xF0F0F0F0;")
_INT2 = _asm("c", _ONE, _dense(2, 0, _OUT, [_HALF2] * 4))
_INT1_EVEN = _asm("c", _ONE, _dense(1, 0, _OUT, [_HALF1] * 4))
_INT1_ODD = _asm("c", _ONE, _dense(1, 4, _OUT, [_HALF1] * 4))
_INT3_EVEN = _asm("c, i, m<4>", _TWO, _int3(False))
_INT3_ODD = _asm("c, i, m<4>", _TWO, _int3(True))
_SPARSE4_EVEN = _asm("c, i, a, b, t, m<4>", _TWO, _sparse(4, False))
_SPARSE4_ODD = _asm("c, i, a, b, t, m<4>", _TWO, _sparse(4, True))
_SPARSE2_EVEN = _asm("c, i, a, b, t, m<4>", _TWO, _sparse(2, False))
_SPARSE2_ODD = _asm("c, i, a, b, t, m<4>", _TWO, _sparse(2, True))


@triton.jit
def _top(lanes, FIRST: tl.constexpr, BITS: tl.constexpr, below):
    """The plain form of :func:`_take`."""
    MASK: tl.constexpr = 256 - (1 << (8 - BITS))
    return (((lanes >> FIRST) << (8 - BITS)) & MASK) | below


@triton.jit
def _signed(a, b, c, d):
    return (
        a.to(tl.int8, bitcast=True),
        b.to(tl.int8, bitcast=True),
        c.to(tl.int8, bitcast=True),
        d.to(tl.int8, bitcast=True),
    )


@triton.jit
def _chosen(left, right, index, ODD: tl.constexpr):
    """The plain form of :func:`_choose`."""
    m0 = ((index >> (4 * ODD)) & 1) * 0xFF
    m1 = ((index >> (4 * ODD + 1)) & 1) * 0xFF
    m2 = ((index >> (4 * ODD + 2)) & 1) * 0xFF
    m3 = ((index >> (4 * ODD + 3)) & 1) * 0xFF
    return _signed(m0 & left, m1 & ((m0 & right) | (~m0 & left)), m2 & ((m3 & left) | (~m3 & right)), m3 & right)


@triton.jit
def _planes(ASM: tl.constexpr, codes):
    return tl.inline_asm_elementwise(
        ASM, "=&r,=&r,=&r,=&r,r", [codes], dtype=(tl.int8, tl.int8, tl.int8, tl.int8), is_pure=True, pack=4
    )


@triton.jit
def _planes_of_two(ASM: tl.constexpr, codes, extra):
    return tl.inline_asm_elementwise(
        ASM, "=&r,=&r,=&r,=&r,r,r", [codes, extra], dtype=(tl.int8, tl.int8, tl.int8, tl.int8), is_pure=True, pack=4
    )


@triton.jit
def unpack_int4(codes, PLAIN: tl.constexpr):
    """Two planes [n, 64]."""
    if PLAIN:
        return _top(codes, 0, 4, 0).to(tl.int8, bitcast=True), _top(codes, 4, 4, 0).to(tl.int8, bitcast=True)
    return tl.inline_asm_elementwise(_INT4, "=&r,=&r,r", [codes], dtype=(tl.int8, tl.int8), is_pure=True, pack=4)


@triton.jit
def unpack_int2(codes, PLAIN: tl.constexpr):
    """Four planes [n, 32]."""
    if PLAIN:
        return _signed(_top(codes, 0, 2, 32), _top(codes, 2, 2, 32), _top(codes, 4, 2, 32), _top(codes, 6, 2, 32))
    return _planes(_INT2, codes)


@triton.jit
def unpack_int1(codes, ODD: tl.constexpr, PLAIN: tl.constexpr):
    """Four planes [n, 32] from half bytes."""
    F: tl.constexpr = 4 * ODD
    if PLAIN:
        return _signed(
            _top(codes, F, 1, 64), _top(codes, F + 1, 1, 64), _top(codes, F + 2, 1, 64), _top(codes, F + 3, 1, 64)
        )
    if ODD:
        return _planes(_INT1_ODD, codes)
    return _planes(_INT1_EVEN, codes)


@triton.jit
def unpack_int3(codes, low, ODD: tl.constexpr, PLAIN: tl.constexpr):
    """Four planes [n, 32] from bytes of upper bits and half bytes of lowest bits."""
    F: tl.constexpr = 4 * ODD
    if PLAIN:
        return _signed(
            _top(codes, 0, 2, _top(low, F, 1, 0) >> 2 | 16),
            _top(codes, 2, 2, _top(low, F + 1, 1, 0) >> 2 | 16),
            _top(codes, 4, 2, _top(low, F + 2, 1, 0) >> 2 | 16),
            _top(codes, 6, 2, _top(low, F + 3, 1, 0) >> 2 | 16),
        )
    if ODD:
        return _planes_of_two(_INT3_ODD, codes, low)
    return _planes_of_two(_INT3_EVEN, codes, low)


@triton.jit
def unpack_sparse4(codes, index, ODD: tl.constexpr, PLAIN: tl.constexpr):
    """Four planes [n, 32] from bytes of kept pairs and half bytes of bitmaps."""
    if PLAIN:
        return _chosen(_top(codes, 0, 4, 0), _top(codes, 4, 4, 0), index, ODD)
    if ODD:
        return _planes_of_two(_SPARSE4_ODD, codes, index)
    return _planes_of_two(_SPARSE4_EVEN, codes, index)


@triton.jit
def unpack_sparse2(codes, index, ODD: tl.constexpr, PLAIN: tl.constexpr):
    """Four planes [n, 32] from half bytes of kept pairs and half bytes of bitmaps."""
    F: tl.constexpr = 4 * ODD
    if PLAIN:
        return _chosen(_top(codes, F, 2, 32), _top(codes, F + 2, 2, 32), index, ODD)
    if ODD:
        return _planes_of_two(_SPARSE2_ODD, codes, index)
    return _planes_of_two(_SPARSE2_EVEN, codes, index)
