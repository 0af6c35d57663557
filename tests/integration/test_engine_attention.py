"""Attention backends against plain attention over each sequence, and with rubbish in free blocks."""

from array import array
from typing import Any

import numpy as np
import pytest
import torch

from deltazip_ray.layers.attention.backend import AttentionBackend, SequenceRows
from deltazip_ray.layers.attention.cache import CacheShape
from deltazip_ray.layers.attention.paged import PagedBackend
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


def make_backend(name: str, shape: CacheShape, kv_dtype: torch.dtype) -> AttentionBackend[Any]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "sdpa":
        return SdpaBackend(shape, torch.float32, device, kv_dtype)
    return PagedBackend(shape, torch.float32, device, kv_dtype, decodes=8)


FP8 = torch.float8_e4m3fn


@pytest.mark.parametrize("name", ["sdpa", "paged"])
@pytest.mark.parametrize(
    ("kind", "kv_heads", "kv_dtype"),
    [
        ("plain", 1, torch.float32),
        ("plain", 2, FP8),
        ("window", 2, torch.float32),
        ("capped", 4, torch.float32),
        ("both", 2, torch.float32),
        ("both", 1, FP8),
    ],
)
def test_chunks_and_decodes_share_a_step(kind: str, kv_heads: int, kv_dtype: torch.dtype, name: str) -> None:
    settings = SETTINGS[kind]
    generator = torch.Generator().manual_seed(kv_heads)
    lengths = [1, 4, 11, 17, 9]
    shape = CacheShape(layers=2, block_size=BLOCK, heads=4, kv_heads=kv_heads, head_dim=HEAD_DIM, **settings)
    backend = make_backend(name, shape, kv_dtype)
    backend.allocate(40)
    # Memory that was never written, or belonged to a broken version, must not reach anybody: all ones are a NaN.
    backend.memory.fill_(255)
    q, k, v = (
        [torch.randn(n, heads, HEAD_DIM, generator=generator) for n in lengths] for heads in (4, kv_heads, kv_heads)
    )
    blocks = torch.randperm(40, generator=generator).tolist()
    tables = [array("i", [blocks.pop() for _ in range(-(-n // BLOCK))]) for n in lengths]
    done = [0] * len(lengths)
    # Tokens that each sequence runs in each step: whole prompts, chunks across block borders, single tokens, none.
    for step in ([1, 4, 3, 1, 5], [0, 0, 7, 9, 1], [0, 0, 1, 7, 1], [0, 0, 0, 0, 2]):
        running = [i for i, count in enumerate(step) if count]
        parts = {i: slice(done[i], done[i] + step[i]) for i in running}
        plan = backend.plan([SequenceRows(step[i], done[i] + step[i], tables[i]) for i in running])
        queries, keys, values = (torch.cat([whole[i][parts[i]] for i in running]) for whole in (q, k, v))
        layer = backend.layers[1]
        layer.write(plan.where, keys.to(backend.device), values.to(backend.device))
        out = backend.attend(1, queries.to(backend.device), plan).cpu()
        expected = torch.cat(
            [plain_attention(q[i][parts[i]], k[i][: parts[i].stop], v[i][: parts[i].stop], shape) for i in running]
        )
        if kv_dtype == torch.float32:
            torch.testing.assert_close(out.double(), expected, atol=1e-6, rtol=1e-5)
        else:  # three bits behind the point, of keys and of values
            assert (out.double() - expected).norm() < 0.06 * expected.norm()
        done = [a + b for a, b in zip(done, step, strict=True)]
    assert done == lengths
    assert (backend.layers[0].keys.view(torch.uint8) == 255).all(), "the other layer was not touched"


def test_a_recorded_step_finds_keys_and_values_where_a_planned_one_does() -> None:
    shape = CacheShape(layers=1, block_size=BLOCK, heads=4, kv_heads=2, head_dim=HEAD_DIM)
    backend = PagedBackend(shape, torch.float32, torch.device("cpu"), decodes=8)
    contexts, table = (1, BLOCK, BLOCK + 1, 4 * BLOCK), array("i", [9, 3, 5, 1])
    sequences = [SequenceRows(1, context, table) for context in contexts]
    tables: dict[str, np.ndarray] = {
        "where": np.zeros(9, np.int64),
        "work": np.zeros(backend.graph_inputs(4, 16)["work"], np.int32),
    }
    backend.fill(np.array(contexts) - 1, [table] * 4, tables)
    assert tables["where"][:4].tolist() == backend.plan(sequences).where.tolist() == [36, 39, 12, 7]
