"""An embedding's deltas: a step needs one row of them for each token."""

from collections.abc import Sequence

import triton
from torch import Tensor

from deltazip_kernels.device.gather import gather
from deltazip_kernels.launch import ceil_div, launch
from deltazip_kernels.table import CODEC_IDS, DeltaTable
from deltazip_kernels.triton_backend import DTYPES

_PAIRS = 4


def gather_rows(out: Tensor, chosen: Tensor, which: Tensor, table: DeltaTable, codecs: Sequence[str]) -> None:
    """Add row ``chosen[t]`` of the delta in slot ``which[t] - 1`` to ``out[t]`` [K]; ``table`` has one part.

    ``chosen`` is [T] int64, ``which`` [T] int32. Nothing is added for rows that the matrix does not have, for
    ``which`` 0 (the base), and for slots that are empty or hold none of ``codecs``.
    """
    ((rows, columns),) = table.shapes
    if not len(out):
        return
    launch(
        gather,
        (len(out), ceil_div(columns, _PAIRS * 256)),
        out,
        out.stride(0),
        chosen,
        which,
        table.entries,
        rows,
        K=columns,
        DTYPE=DTYPES[table.dtype],
        CODECS=tuple(CODEC_IDS[name] for name in codecs),
        PAIRS=_PAIRS,
        PLAIN=triton.knobs.runtime.interpret,
        num_warps=4,
    )
