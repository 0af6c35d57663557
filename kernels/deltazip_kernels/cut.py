"""Top-k and top-p without sorting: the least weight that they keep, found by bisection on its bits.

Weights are whole numbers, so their sums in float64 are exact, and positive floats are ordered as their bits are. What
is kept is therefore what sorting would keep (``cut_sorted`` of ``engine/sampling/weights.py`` is the meaning), for some
16 passes over a row instead of a sort of it.
"""

import torch
from torch import Tensor

from deltazip_kernels.device.cut import cut

_BLOCK, _UNROLL, _WARPS = 4096, 4, 32  # of eight sizes tried on an H200 the fastest for 1 and for 256 rows


def least_kept(weights: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """The least weight [rows, 1] that top-k, and then top-p of the rest, keep; 0 and tokens below it go.

    ``weights`` [rows, vocab] float32: whole numbers from 0 to 2**34, that of the best token. ``top_k`` (infinite for
    all) and ``top_p`` (above 0) [rows, 1] float64. Anything for a row that is not finite.
    """
    rows, vocab = weights.shape
    least = torch.empty((rows, 1), dtype=torch.float32, device=weights.device)
    if rows:
        cut[(rows,)](
            weights, weights.stride(0), vocab, top_k, top_p, least, BLOCK=_BLOCK, UNROLL=_UNROLL, num_warps=_WARPS
        )  # fmt: skip
    return least
