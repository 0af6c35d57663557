"""Rotary position embedding, as the Llama family applies it (halves, not pairs)."""

import torch


class Rotary:
    """Cosines and sines of all positions, computed once in float32."""

    def __init__(
        self, inv_freq: torch.Tensor, scale: float, positions: int, *, dtype: torch.dtype, device: torch.device
    ) -> None:
        """``inv_freq`` ``[head_dim / 2]``; ``scale`` multiplies cosine and sine."""
        angles = torch.arange(positions, dtype=torch.float32)[:, None] * inv_freq.float()[None, :]
        self.half = inv_freq.numel()
        self.cos = (torch.cat((angles, angles), dim=-1).cos() * scale).to(device, dtype)[:, None, :]
        # The sign of rotate_half is folded into the table.
        self.sin = (torch.cat((-angles, angles), dim=-1).sin() * scale).to(device, dtype)[:, None, :]

    def select(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Tables ``[rows, 1, head_dim]`` for ``positions`` ``[rows]``; taken once a step, used by every layer."""
        return self.cos[positions], self.sin[positions]

    def __call__(self, x: torch.Tensor, tables: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """Rotate ``x`` ``[rows, heads, head_dim]``."""
        cos, sin = tables
        return x * cos + torch.roll(x, self.half, dims=-1) * sin
