"""What a start spends its time on, and where what it compiles is kept."""

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
        """All that was done since the last call, also on the device, was ``stage``."""
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
    """Keep compiled kernels in ``folder``, so that a second start finds them; None: where Triton and FlashInfer do.

    FlashInfer looks once, when it is imported.
    """
    if folder is not None:
        triton.knobs.cache.dir = str(folder / "triton")
        os.environ["FLASHINFER_WORKSPACE_BASE"] = str(folder)
