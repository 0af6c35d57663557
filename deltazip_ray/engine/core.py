"""Puts the parts of an engine together around a base checkpoint."""

from dataclasses import dataclass
from pathlib import Path

import torch

from deltazip_ray.artifact.checkpoint import Checkpoint, base_digest
from deltazip_ray.config import EngineConfig
from deltazip_ray.engine.device_slots import BaseIdentity, DeviceSlots
from deltazip_ray.engine.runner import ModelRunner
from deltazip_ray.errors import ConfigError
from deltazip_ray.layers.attention.backend import CacheShape
from deltazip_ray.layers.attention.sdpa import SdpaBackend
from deltazip_ray.models.decoder import Decoder
from deltazip_ray.models.decoder_config import DecoderConfig, read_decoder_config
from deltazip_ray.models.weights import Placement, WeightReader
from deltazip_ray.scheduler.scheduler import Scheduler

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class EngineCore:
    """Everything of an engine that knows no asyncio."""

    base: BaseIdentity
    max_model_len: int
    """Tokens of a sequence: the least of what the settings and the model allow."""
    slots: DeviceSlots
    runner: ModelRunner
    scheduler: Scheduler


def build_core(config: EngineConfig, base: Path) -> EngineCore:
    """Read the base and allocate slots and KV cache: takes seconds to minutes.

    Raises ConfigError, CheckpointInvalid.
    """
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    device = torch.device(config.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError("engine.device is cuda, but torch sees no GPU here: set it to cpu, or install torch for CUDA")
    checkpoint = Checkpoint.open(base)
    shape = read_decoder_config(checkpoint.config)
    identity = BaseIdentity(base_digest(checkpoint), shape.vocab_size)
    max_model_len = min(config.max_model_len, shape.max_positions)
    placement = Placement(_DTYPES[config.dtype], device, config.slots, config.max_added_tokens)
    weights = WeightReader(checkpoint, placement)
    attention = SdpaBackend(_cache_shape(config, shape), placement.dtype, device)
    decoder = Decoder(shape, weights, attention, max_model_len)
    return EngineCore(
        base=identity,
        max_model_len=max_model_len,
        slots=DeviceSlots(weights.targets, placement, identity, config.slot_bytes, config.copy_bytes_per_s),
        runner=ModelRunner(decoder, attention, placement.ops, device),
        scheduler=Scheduler(config.model_copy(update={"max_model_len": max_model_len})),
    )


def _cache_shape(config: EngineConfig, shape: DecoderConfig) -> CacheShape:
    return CacheShape(
        layers=shape.layers,
        blocks=config.kv_blocks,
        block_size=config.block_size,
        heads=shape.heads,
        kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
    )
