"""Assembles the parts of an engine around a base checkpoint."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from deltazip_ray.artifact.checkpoint import Checkpoint
from deltazip_ray.artifact.digest_cache import known_base_digest
from deltazip_ray.config import EngineConfig
from deltazip_ray.engine.decode_graphs import DecodeGraphs
from deltazip_ray.engine.device_slots import BaseIdentity, DeviceSlots
from deltazip_ray.engine.memory import allocate
from deltazip_ray.engine.runner import ModelRunner
from deltazip_ray.engine.start_up import StartUp, keep_kernels
from deltazip_ray.engine.warm_up import record_graphs, run_steps
from deltazip_ray.errors import ConfigError
from deltazip_ray.layers.attention.backend import AttentionBackend
from deltazip_ray.layers.attention.cache import CacheShape
from deltazip_ray.layers.attention.capture import CapturableBackend
from deltazip_ray.layers.attention.choose import make_attention
from deltazip_ray.layers.device import check_device
from deltazip_ray.layers.ops import LayerOps
from deltazip_ray.layers.triton_ops import TritonOps
from deltazip_ray.models.decoder import Decoder
from deltazip_ray.models.decoder_config import DecoderConfig, read_decoder_config
from deltazip_ray.models.weights import Placement, WeightReader, WeightSource
from deltazip_ray.scheduler.scheduler import Scheduler

logger = logging.getLogger(__name__)

_FP8_CAPABILITY = (8, 9)
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class EngineCore:
    """The parts of an engine that do not use asyncio."""

    base: BaseIdentity
    max_model_len: int
    """Maximum tokens of a sequence: the lowest of the setting's, the model's and the KV cache's limits."""
    slots: DeviceSlots
    slot_blocks: Sequence[range]
    """The KV blocks that each slot's memory becomes when it is lent."""
    runner: ModelRunner
    scheduler: Scheduler
    start: StartUp
    """The durations of the start's stages."""


def build_core(config: EngineConfig, base: Path) -> EngineCore:
    """Load the base and allocate slots and KV cache, which takes seconds to minutes.

    Raises ConfigError, CheckpointInvalid.
    """
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    check_device(config.device, "engine.device")
    start = StartUp(torch.device(config.device))
    checkpoint = Checkpoint.open(base)
    shape = read_decoder_config(checkpoint.config)
    digest = known_base_digest(checkpoint)
    start.end("digest")
    return assemble(config, shape, checkpoint, digest, start)


def assemble(
    config: EngineConfig, shape: DecoderConfig, weights: WeightSource, digest: str, start: StartUp | None = None
) -> EngineCore:
    """Build an engine with weights from any source. Raises ConfigError, CheckpointInvalid."""
    start = start or StartUp(torch.device(config.device))
    keep_kernels(config.kernel_cache)
    device, dtype = torch.device(config.device), _DTYPES[config.dtype]
    max_model_len = min(config.max_model_len, shape.max_positions)
    fp8 = config.base_dtype == "fp8"
    placement = Placement(dtype, device, config.slots, config.max_added_tokens, _ops(config, device, dtype), fp8)
    reader = WeightReader(weights, placement)
    attention = make_attention(config, _cache_shape(config, shape, max_model_len), dtype, device)
    start.end("attention")
    decoder = Decoder(shape, reader, attention, max_model_len)
    start.end("base")
    identity = BaseIdentity(digest, shape.vocab_size)
    slots = DeviceSlots(reader.targets, placement, identity, config.slot_bytes, config.copy_bytes_per_s)
    slot_blocks = allocate(config, shape, attention, slots)
    start.end("slots and KV cache")
    settled = config.model_copy(update={"max_model_len": max_model_len, "kv_blocks": attention.blocks})
    runner = _runner(settled, decoder, attention, placement, slots)
    if config.warm_up or (config.warm_up is None and device.type == "cuda"):
        run_steps(runner, settled)
        start.end("warm-up")
        slots.warm_up.codecs(config.warm_codecs)
        start.end("codecs")
        record_graphs(runner, config.slots if config.warm_codecs else 0)
        start.end("graphs")
    scheduler = Scheduler(settled)
    slots.idle = lambda: not scheduler.has_work
    slots.overlap = device.type == "cuda" if config.overlap_loads is None else config.overlap_loads
    longest = min(max_model_len, attention.blocks * config.block_size)
    if longest < max_model_len:
        logger.warning("the KV cache holds %d tokens, so that requests end there, not at %d", longest, max_model_len)
    return EngineCore(identity, longest, slots, slot_blocks, runner, scheduler, start)


def _ops(config: EngineConfig, device: torch.device, dtype: torch.dtype) -> LayerOps:
    if config.kernels == "torch" or (config.kernels == "auto" and device.type != "cuda"):
        return LayerOps()
    fp8 = config.base_dtype == "fp8"
    if fp8 and device.type == "cuda":
        check_fp8(config, torch.cuda.get_device_capability(device))
    return TritonOps(device, dtype, fp8=fp8)


def check_fp8(config: EngineConfig, capability: tuple[int, int]) -> None:
    """Raise ConfigError if the kernels for a base in fp8 are not supported here."""
    if config.dtype != "bfloat16":
        raise ConfigError(f"engine.base_dtype fp8 on cuda goes with dtype bfloat16, not {config.dtype}")
    if capability < _FP8_CAPABILITY:
        raise ConfigError(
            "engine.base_dtype fp8 needs a GPU of compute capability 8.9 or later, this one has "
            f"{capability[0]}.{capability[1]}: leave it out, or set engine.kernels to torch"
        )


def _runner(
    config: EngineConfig,
    decoder: Decoder,
    attention: AttentionBackend[Any],
    placement: Placement,
    slots: DeviceSlots,
) -> ModelRunner:
    ops = placement.ops
    drawn = torch.zeros(config.max_running, dtype=torch.int64, device=placement.device)
    graphs = None
    wanted = config.cuda_graphs and drawn.is_cuda
    if wanted and isinstance(attention, CapturableBackend) and isinstance(ops, TritonOps):
        pages = config.max_running * -(-config.max_model_len // config.block_size)
        graphs = DecodeGraphs(decoder, attention, ops, drawn, config.slots, pages)
    return ModelRunner(decoder, attention, ops, drawn, graphs, slots.arriving)


def _cache_shape(config: EngineConfig, shape: DecoderConfig, max_model_len: int) -> CacheShape:
    windows = [None if window is None or window >= max_model_len else window for window in shape.windows]
    return CacheShape(
        layers=shape.layers,
        block_size=config.block_size,
        heads=shape.heads,
        kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        scale=shape.attention_scale,
        softcap=shape.attention_softcap,
        windows=tuple(windows),
    )
