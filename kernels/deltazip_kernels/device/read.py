"""A kernel that reads and does nothing else, for the benchmark."""

import triton
import triton.language as tl


@triton.jit
def read(source, out, WORDS: tl.constexpr):
    """One block of ``source`` [.] int32 a program; ``out`` [1] is written for one sum in 2**32."""
    at = tl.program_id(0).to(tl.int64) * WORDS + tl.arange(0, WORDS)
    total = tl.sum(tl.load(source + at), 0)
    if total == 1:  # the compiler has to believe that the sum matters
        tl.store(out, total)
