"""Chooses the attention implementation of an engine."""

from typing import Any

import torch

from deltazip_ray.config import EngineConfig
from deltazip_ray.errors import ConfigError
from deltazip_ray.layers.attention.backend import AttentionBackend
from deltazip_ray.layers.attention.cache import FP8, CacheShape
from deltazip_ray.layers.attention.paged import PagedBackend
from deltazip_ray.layers.attention.sdpa import SdpaBackend

_FLASHINFER_HEADS = (64, 128, 256)
_FLASHINFER_DTYPES = (torch.bfloat16, torch.float16)


def make_attention(
    config: EngineConfig, shape: CacheShape, dtype: torch.dtype, device: torch.device
) -> AttentionBackend[Any]:
    """The backend for these settings and the model's heads, without a cache yet. Raises ConfigError."""
    kv_dtype = FP8 if config.kv_dtype == "fp8" else dtype
    if config.attention == "sdpa" or (config.attention == "auto" and device.type != "cuda"):
        return SdpaBackend(shape, dtype, device, kv_dtype)
    known = device.type == "cuda" and shape.head_dim in _FLASHINFER_HEADS and kv_dtype in _FLASHINFER_DTYPES
    # For windows and soft caps it would compile kernels of their own, a minute each.
    plain = shape.softcap is None and not any(shape.windows)
    if config.attention == "triton" or (config.attention == "auto" and not (known and plain)):
        return PagedBackend(shape, dtype, device, kv_dtype, decodes=config.max_running)
    if not known:
        raise ConfigError(
            f"flashinfer has no kernels for {config.device}, heads of {shape.head_dim} and keys in {kv_dtype}: "
            "set engine.attention to auto"
        )
    try:
        from deltazip_ray.layers.attention.flashinfer import FlashInferBackend  # installed where there is a GPU
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"attention on cuda needs {error.name}: pip install 'deltazip-ray[gpu]', or set engine.attention to triton"
        ) from error

    return FlashInferBackend(shape, dtype, device, decodes=config.max_running)
