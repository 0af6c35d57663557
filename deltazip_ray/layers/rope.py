"""Rotary position embedding in the form of the Llama family (halves, not pairs)."""

import torch

from deltazip_kernels.rope import RotaryTables


class Rotary:
    """Cosines and sines of all positions, computed once; rotation is in float32."""

    def __init__(self, inv_freq: torch.Tensor, scale: float, positions: int, device: torch.device) -> None:
        """``inv_freq`` ``[rotated columns / 2]``; ``scale`` multiplies cosine and sine."""
        angles = torch.arange(positions, dtype=torch.float32)[:, None] * inv_freq.float()[None, :]
        self.tables = RotaryTables((angles.cos() * scale).to(device), (angles.sin() * scale).to(device))

    def select(self, positions: torch.Tensor) -> RotaryTables:
        """The tables' rows for ``positions`` ``[rows]``."""
        return RotaryTables(self.tables.cos[positions], self.tables.sin[positions])

    def __call__(self, x: torch.Tensor, rows: RotaryTables) -> torch.Tensor:
        """Rotate ``x`` ``[rows, heads, head_dim]`` by :meth:`select`'s tables; columns after the rotated ones stay."""
        cos, sin = rows.cos[:, None], rows.sin[:, None]
        half = cos.shape[-1]
        left, right, rest = x.split([half, half, x.shape[-1] - 2 * half], dim=-1)
        turned = torch.cat((left * cos - right * sin, right * cos + left * sin), dim=-1)
        return torch.cat((turned.to(x.dtype), rest), dim=-1)
