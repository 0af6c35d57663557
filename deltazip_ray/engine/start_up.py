"""Measures the stages of a start, and sets the cache for compiled kernels."""

import os
import time
from pathlib import Path

import torch
import triton


class StartUp:
    """Seconds of each stage of a start, in order."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._since = time.perf_counter()
        self.seconds: dict[str, float] = {}

    def end(self, stage: str) -> None:
        """End ``stage``: the time since the last call, including work on the device."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        now = time.perf_counter()
        self.seconds[stage] = self.seconds.get(stage, 0.0) + now - self._since
        self._since = now

    def __str__(self) -> str:
        """One line."""
        stages = ", ".join(f"{name} {spent:.2f}" for name, spent in self.seconds.items())
        return f"{sum(self.seconds.values()):.2f} s: {stages}"


def keep_kernels(folder: Path | None) -> None:
    """Cache compiled kernels in ``folder`` for later starts; None: in the default folders of Triton and FlashInfer.

    Call it before FlashInfer is imported, which reads the setting once.
    """
    if folder is not None:
        triton.knobs.cache.dir = str(folder / "triton")
        os.environ["FLASHINFER_WORKSPACE_BASE"] = str(folder)
