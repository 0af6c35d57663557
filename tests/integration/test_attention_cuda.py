"""The engine on a GPU with our own attention kernels, decodes in CUDA graphs, against transformers."""

import pytest

from tests.integration.test_engine_cuda import SETTINGS, all_of, wide_zoo
from tests.support.engines import running
from tests.support.versions import MemorySource
from tests.support.zoo import Zoo

__all__ = ["wide_zoo"]
pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(
    ("settings", "worst"),
    [
        ({"attention": "triton"}, 0.3),
        # Logits of these models, which learned nothing, move by 6 % of their spread (test_engine_logits).
        ({"kv_dtype": "fp8"}, 0.6),
    ],
)
async def test_mixed_requests(wide_zoo: Zoo, settings: dict[str, str], worst: float) -> None:
    async with running(wide_zoo.base, MemorySource(*wide_zoo.versions), **SETTINGS | settings) as run:
        assert await all_of(run, wide_zoo, 40, 24) < worst
