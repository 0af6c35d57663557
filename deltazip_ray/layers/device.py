"""The devices that a setting may name."""

import torch

from deltazip_ray.errors import ConfigError


def check_device(device: str, setting: str) -> None:
    """Raise ConfigError when ``setting`` names a GPU and torch sees none."""
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"{setting} is cuda, but torch sees no GPU here: set it to cpu, or install torch for CUDA")
