"""Plans a GPU's memory at the start: base, slots, workspace, and the KV cache in what is left."""

import logging
from dataclasses import dataclass
from typing import Any

import torch

from deltazip_kernels.merged import MERGE_ROWS
from deltazip_ray.config import CPU_KV_BLOCKS, GIB, EngineConfig
from deltazip_ray.engine.device_slots import DeviceSlots
from deltazip_ray.errors import ConfigError
from deltazip_ray.layers.attention.backend import AttentionBackend
from deltazip_ray.models.decoder_config import DecoderConfig

logger = logging.getLogger(__name__)

_GRAPHS = GIB  # CUDA graphs, cuBLAS and what the allocator cannot use
_FEWEST = 16
"""Minimum blocks of a useful cache."""


@dataclass(frozen=True)
class DeviceMemory:
    """Bytes of one device."""

    total: int
    free: int
    own: int
    """Allocated by this process."""


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of one device."""

    total: int
    base: int
    slots: int
    workspace: int
    cache: int
    blocks: int
    tokens: int
    """Capacity of the cache."""

    def __str__(self) -> str:
        """A table."""
        rows = {"base": self.base, "slots": self.slots, "workspace": self.workspace, "KV cache": self.cache}
        rest = self.total - sum(rows.values())
        lines = [f"  {name:<16} {size / GIB:8.2f} GiB" for name, size in (rows | {"left to others": rest}).items()]
        return "\n".join([*lines, f"  KV cache: {self.blocks} blocks, {self.tokens} tokens"])


def workspace_bytes(config: EngineConfig, shape: DecoderConfig, itemsize: int) -> int:
    """Upper bound of a step's memory besides weights and cache: activations, one merged weight, logits, graphs."""
    attention = (shape.heads + 2 * shape.kv_heads) * shape.head_dim
    widest = max(3 * shape.intermediate_size, attention + shape.heads * shape.head_dim)
    rows = config.max_batch_tokens * (4 * shape.hidden_size + widest) * (itemsize + (2 if config.base_dtype else 1))
    # The head is merged where that many requests of one version sample in a step.
    merged = max(2 * shape.intermediate_size, shape.vocab_size if config.max_running >= MERGE_ROWS else 0)
    logits = (shape.vocab_size + config.max_added_tokens) * (2 * itemsize + 3 * 4)
    added = config.max_added_tokens * shape.hidden_size * itemsize  # a copy of its version's rows for each row
    return rows + merged * shape.hidden_size * itemsize + config.max_running * (logits + added) + _GRAPHS


def measure(device: torch.device) -> DeviceMemory:
    """A GPU's current memory, after emptying torch's cache."""
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    return DeviceMemory(total, free, torch.cuda.memory_reserved(device))


def plan_memory(
    config: EngineConfig, memory: DeviceMemory, *, base: int, slots: int, workspace: int, block_bytes: int
) -> MemoryPlan:
    """Fit blocks of ``block_bytes`` into ``config.memory_fraction``. Raises ConfigError if there are too few.

    The fraction is for this engine alone, whatever others use, so two engines can share a GPU with 0.45 each.
    ``base`` is allocated already. With ``config.kv_blocks`` the plan has that many, if they fit.
    """
    total = memory.total
    left = min(int(total * config.memory_fraction) - memory.own, memory.free) - slots - workspace
    blocks = left // block_bytes - 1 if config.kv_blocks is None else config.kv_blocks
    plan = MemoryPlan(
        total, base, slots, workspace, max(blocks, 0) * block_bytes, blocks, max(blocks, 0) * config.block_size
    )
    if blocks < _FEWEST or (blocks + 1) * block_bytes > left:
        raise ConfigError(
            f"the engine does not fit the GPU's {total / GIB:.1f} GiB, of which engine.memory_fraction allows "
            f"{config.memory_fraction:.0%} and {memory.free / GIB:.1f} GiB are free:\n{plan}\n"
            "lower engine.slots, slot_bytes, max_batch_tokens or kv_blocks"
        )
    return plan


def allocate(
    config: EngineConfig, shape: DecoderConfig, attention: AttentionBackend[Any], slots: DeviceSlots
) -> list[range]:
    """Allocate the KV cache and, behind it, the slots, each a whole number of blocks. Call it after loading the base.

    Returns the blocks of each slot. Raises ConfigError.
    """
    count, each = config.slots, -(-slots.slot_bytes // attention.block_bytes)
    if attention.device.type == "cuda":
        plan = plan_memory(
            config,
            measure(attention.device),
            base=torch.cuda.memory_allocated(attention.device),
            slots=count * each * attention.block_bytes,
            workspace=workspace_bytes(config, shape, attention.dtype.itemsize),
            block_bytes=attention.block_bytes,
        )
        logger.info("GPU memory:\n%s", plan)
        blocks = plan.blocks
    else:
        blocks = config.kv_blocks or CPU_KV_BLOCKS
    attention.allocate(blocks, count * each)
    slots.memory = attention.memory[blocks : blocks + count * each].view(count, -1)
    return [range(start, start + each) for start in range(blocks, blocks + count * each, each)]
