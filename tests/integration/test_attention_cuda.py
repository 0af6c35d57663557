"""Attention on a GPU: in an engine with our own kernels, against transformers; and over a cache of many gigabytes."""

from array import array
from typing import Any

import pytest
import torch

from deltazip_ray.config import EngineConfig
from deltazip_ray.layers.attention.backend import AttentionBackend, SequenceRows
from deltazip_ray.layers.attention.cache import CacheShape
from deltazip_ray.layers.attention.choose import make_attention
from deltazip_ray.layers.rope import Rotary
from deltazip_ray.layers.triton_ops import TritonOps
from tests.integration.test_engine_cuda import SETTINGS, all_of, regrets_of_all, wide_zoo
from tests.support.engines import running
from tests.support.versions import MemorySource
from tests.support.zoo import Zoo

__all__ = ["wide_zoo"]
pytestmark = pytest.mark.gpu


async def test_mixed_requests(wide_zoo: Zoo) -> None:
    async with running(wide_zoo.base, MemorySource(*wide_zoo.versions), **SETTINGS | {"attention": "triton"}) as run:
        assert await all_of(run, wide_zoo, 40, 24) < 0.3


async def test_a_cache_in_fp8(wide_zoo: Zoo) -> None:
    async with running(wide_zoo.base, MemorySource(*wide_zoo.versions), **SETTINGS | {"kv_dtype": "fp8"}) as run:
        found = await regrets_of_all(run, wide_zoo, 40, 24)
        # Logits of these models, which learned nothing, move by 6 % of their spread (test_engine_logits): far for some
        # token, little for most.
        assert found.max() < 1.0
        assert found.mean() < 0.05


@pytest.mark.parametrize("change", [{}, {"attention": "triton"}, {"kv_dtype": "fp8"}], ids=str)
def test_blocks_behind_two_to_the_32_numbers(change: dict[str, Any]) -> None:
    """An 8B model's cache has that many: with offsets of 32 bits they would be taken for blocks at its front."""
    shape = CacheShape(layers=64, block_size=16, heads=8, kv_heads=2, head_dim=128)
    backend = make_attention(EngineConfig(device="cuda", **change), shape, torch.bfloat16, torch.device("cuda"))
    blocks = (1 << 32) // (64 * 2 * 16 * 2 * 128) + 5
    backend.allocate(blocks)
    behind = attended(backend, range(blocks - 5, blocks))
    assert backend.memory.view(torch.int64).any(1).nonzero().flatten().tolist() == [*range(blocks - 5, blocks)]
    assert torch.equal(behind, attended(backend, range(5)))


def attended(backend: AttentionBackend[Any], blocks: range) -> torch.Tensor:
    """Attention of two sequences in five blocks, in the last layer: of their prompts, then of a token each."""
    gpu, generator = backend.device, torch.Generator("cuda").manual_seed(0)
    ops, rotary = TritonOps(gpu, torch.bfloat16), Rotary(torch.linspace(1, 0.01, 64), 1.0, 64, gpu)
    tables = array("i", blocks[:3]), array("i", blocks[3:])
    outputs = []
    for queries, contexts in (((40, 29), (40, 29)), ((1, 1), (41, 30))):
        plan = backend.plan([SequenceRows(*one) for one in zip(queries, contexts, tables, strict=True)])
        ends = zip(queries, contexts, strict=True)
        positions = torch.cat([torch.arange(end - count, end) for count, end in ends]).to(gpu)
        qkv = torch.randn(sum(queries), 12 * 128, generator=generator, device=gpu).bfloat16()
        q = ops.rotate(qkv, positions, rotary, backend.layers[-1], plan.where)
        outputs.append(backend.attend(len(backend.layers) - 1, q, plan))
    return torch.cat(outputs)
