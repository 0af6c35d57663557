"""How exactly float32 matrices are multiplied on a GPU; a CPU multiplies them exactly anyway."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch


@contextmanager
def float32_products(precision: Literal["highest", "high"]) -> Iterator[None]:
    """Within, products of float32 matrices round their factors to TF32 (``high``, tensor cores) or do not."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
