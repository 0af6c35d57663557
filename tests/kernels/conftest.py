"""Triton kernels run on a GPU where there is one, else in Triton's interpreter on the CPU."""

from typing import Any

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    from triton.runtime import interpreter

    def _all_ones(_: Any, dtype: Any) -> Any:
        """As in Triton 3.9: the interpreter of 3.7, which torch 2.13 asks for, inverts no uint8 with NumPy 2."""
        return interpreter.TensorHandle(np.full(1, -1).astype(interpreter._get_np_dtype(dtype)), dtype.scalar)

    interpreter.InterpreterBuilder.get_all_ones_value = _all_ones


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
