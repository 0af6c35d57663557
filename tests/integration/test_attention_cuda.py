"""The engine on a GPU with our own attention kernels, decodes in CUDA graphs, against transformers."""

import pytest

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
