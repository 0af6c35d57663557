"""The paged attention backend against plain attention over each sequence, and with rubbish in free blocks."""

from typing import Any

import pytest
import torch

from deltazip_ray.layers.attention.backend import CacheShape, SequenceRows
from deltazip_ray.layers.attention.sdpa import SdpaBackend

BLOCK, HEAD_DIM, WINDOW = 4, 8, 5
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "window": {"windows": (None, WINDOW)},
    "capped": {"softcap": 0.7, "scale": 0.6},
    "both": {"softcap": 0.7, "windows": (None, WINDOW)},
}


def plain_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, shape: CacheShape) -> torch.Tensor:
    """Attention of the last rows in layer 1: ``q`` ``[n, heads, d]``, ``k`` and ``v`` ``[context, kv_heads, d]``."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1).double(), v.repeat_interleave(group, 1).double()
    scores = torch.einsum("qhd,khd->hqk", q.double(), k) * (shape.scale or HEAD_DIM**-0.5)
    if shape.softcap is not None:
        scores = shape.softcap * torch.tanh(scores / shape.softcap)
    ahead = len(k) - len(q) + 1
    hidden = torch.ones(len(q), len(k), dtype=torch.bool).triu(ahead)
    if shape.windows:
        hidden |= torch.ones(len(q), len(k), dtype=torch.bool).tril(ahead - 1 - WINDOW)
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v).flatten(1)


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_chunks_and_decodes_share_a_step(kv_heads: int, settings: dict[str, Any]) -> None:
    generator = torch.Generator().manual_seed(kv_heads)
    lengths = [1, 4, 11, 17, 9]
    shape = CacheShape(layers=2, block_size=BLOCK, heads=4, kv_heads=kv_heads, head_dim=HEAD_DIM, **settings)
    backend = SdpaBackend(shape, torch.float32, torch.device("cpu"))
    backend.allocate(40)
    # Memory that was never written, or belonged to a broken version, must not reach anybody.
    for layer in backend.layers:
        layer.keys.fill_(torch.nan)
        layer.values.fill_(torch.nan)
    q, k, v = (
        [torch.randn(n, heads, HEAD_DIM, generator=generator) for n in lengths] for heads in (4, kv_heads, kv_heads)
    )
    blocks = torch.randperm(40, generator=generator).tolist()
    tables = [[blocks.pop() for _ in range(-(-n // BLOCK))] for n in lengths]
    done = [0] * len(lengths)
    # Tokens that each sequence runs in each step: whole prompts, chunks across block borders, single tokens, none.
    for step in ([1, 4, 3, 1, 5], [0, 0, 7, 9, 1], [0, 0, 1, 7, 1], [0, 0, 0, 0, 2]):
        running = [i for i, count in enumerate(step) if count]
        parts = {i: slice(done[i], done[i] + step[i]) for i in running}
        plan = backend.plan([SequenceRows(step[i], done[i] + step[i], tables[i]) for i in running])
        queries, keys, values = (torch.cat([whole[i][parts[i]] for i in running]) for whole in (q, k, v))
        backend.layers[1].keys[plan.where] = keys
        backend.layers[1].values[plan.where] = values
        out = backend.attend(1, queries, plan)
        expected = torch.cat(
            [plain_attention(q[i][parts[i]], k[i][: parts[i].stop], v[i][: parts[i].stop], shape) for i in running]
        )
        torch.testing.assert_close(out.double(), expected, atol=1e-6, rtol=1e-5)
        done = [a + b for a, b in zip(done, step, strict=True)]
    assert done == lengths
    assert backend.layers[0].keys.isnan().all(), "the other layer was not touched"
