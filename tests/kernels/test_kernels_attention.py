"""Attention over a paged cache against plain attention in float64, decodes and prefills of one step."""

import numpy as np
import pytest
import torch
from torch import Tensor

from deltazip_kernels import attention
from deltazip_kernels.attention import (
    AttentionWork,
    PagedCache,
    Parts,
    Scoring,
    decode_attention,
    prefill_attention,
    prefill_queries,
)
from deltazip_kernels.attention_items import FIELDS, Contexts, decode_items, pack, prefill_items

LENGTHS = np.array([1, 300, 129, 64, 17, 520])
WANTED = 10
"""Items: the longest sequences are cut into some."""


def plain(q: Tensor, k: Tensor, v: Tensor, scoring: Scoring) -> Tensor:
    """Causal attention [n, H, D] of the last rows ``q`` of a sequence over ``k`` and ``v`` [context, G, D]."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.double().repeat_interleave(group, 1) for x in (k, v))
    s = torch.einsum("qhd,khd->hqk", q.double(), k) * scoring.scale
    if scoring.cap is not None:
        s = scoring.cap * torch.tanh(s / scoring.cap)
    context = torch.arange(len(k), device=q.device)
    behind = context[-len(q) :, None] - context
    hidden = (behind < 0) | (behind >= (scoring.window or len(k)))
    return torch.einsum("hqk,khd->qhd", s.masked_fill(hidden, -torch.inf).softmax(-1), v)


class Paged:
    """A cache in float8 or not, the pages of sequences anywhere in it, and what a step does with them."""

    def __init__(self, queries: np.ndarray, shape: tuple[int, int, int], page: int, dtype: torch.dtype) -> None:
        self.heads, groups, dim = shape
        self.generator = torch.Generator().manual_seed(dim)
        self.queries, counts = queries, -(-LENGTHS // page)
        self.contexts = Contexts(np.cumsum(queries) - queries, queries, LENGTHS, np.cumsum(counts) - counts)
        self.pages = torch.randperm(counts.sum() + 2, generator=self.generator)[:-2].int()
        self.stored = torch.randn((counts.sum() + 2, 2, page, groups, dim), generator=self.generator).to(dtype)
        self.q = torch.randn((queries.sum(), self.heads, dim), generator=self.generator).to(dtype)

    def rounded(self) -> Tensor:
        """The scales of a cache in float8; ``stored`` is what it then means."""
        scales = self.stored.float().abs().amax(-1) / 448
        self.codes = (self.stored.float() / scales[..., None]).to(torch.float8_e4m3fn)
        self.stored = (self.codes.float() * scales[..., None]).to(self.stored.dtype)
        return scales.transpose(2, 3).contiguous()

    def sequence(self, i: int) -> Tensor:
        """[context, 2, G, D] of one."""
        first = self.contexts.tables[i]
        page = self.stored.shape[2]
        used = self.pages[first : first - (-LENGTHS[i] // page)].long()
        return self.stored[used].transpose(1, 2).flatten(0, 1)[: LENGTHS[i]]

    def work(self, items: np.ndarray, device: torch.device, idle: int = 0) -> AttentionWork:
        """The second of two launches in one array, with ``idle`` programs that have nothing to do."""
        most = len(items) + idle
        packed = torch.from_numpy(pack([items[:2].copy(), items], self.pages.numpy(), most)).to(device)
        return AttentionWork(packed[most * FIELDS : 2 * most * FIELDS], packed)

    def expected(self, scoring: Scoring) -> Tensor:
        rows = self.q.split(self.queries.tolist())
        return torch.cat([plain(q, *self.sequence(i).unbind(1), scoring) for i, q in enumerate(rows)])


def distance(got: Tensor, expected: Tensor) -> float:
    return float((got.cpu().double() - expected).norm() / expected.norm())


KINDS = [
    ((8, 2, 32), 16, torch.float32, Scoring(0.2)),
    ((7, 1, 20), 4, torch.float16, Scoring(0.3, cap=5.0, window=100)),
    ((4, 4, 128), 8, torch.float16, Scoring(0.1, window=1)),
    ((16, 8, 256), 32, torch.bfloat16, Scoring(0.06, cap=50.0)),
]


@pytest.mark.parametrize("eight", [False, True], ids=["", "fp8"])
@pytest.mark.parametrize(("shape", "page", "dtype", "scoring"), KINDS, ids=lambda kind: str(kind))
def test_decodes_and_prefills(
    shape: tuple[int, int, int], page: int, dtype: torch.dtype, scoring: Scoring, eight: bool, device: torch.device
) -> None:
    if dtype == torch.bfloat16 and device.type == "cpu":
        pytest.skip("Triton's interpreter has no bfloat16 products")
    heads, groups, dim = shape
    for queries in (np.ones_like(LENGTHS), np.array([1, 300, 100, 2, 17, 33])):
        step = Paged(queries, shape, page, dtype)
        scales = step.rounded().to(device) if eight else None
        keys, values = (step.codes if eight else step.stored).to(device).unbind(1)
        cache, q = PagedCache(keys, values, scales), step.q.to(device)
        out = torch.full_like(q, torch.nan)
        if queries.max() > 1:
            items = prefill_items(step.contexts, prefill_queries(dtype, heads, groups, dim), scoring.window)
            prefill_attention(q, cache, step.work(items, device), scoring, out)
        else:
            items = decode_items(step.contexts, WANTED, scoring.window)
            parts = Parts(len(items) + 3, heads, dim, device)
            parts.values.fill_(torch.nan)
            decode_attention(q, cache, step.work(items, device, 3), scoring, parts, out)
            assert not parts.arrived.any()
        assert distance(out, step.expected(scoring)) < 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize(("items", "programs"), [(1, 2), (33, 2), (49, 3), (66, 4), (500, 4)])
def test_a_processor_has_room_for_its_share_of_programs_and_no_more(
    items: int, programs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "_processors", lambda _: (132, 228 << 10))
    keys = torch.empty((1, 16, 8, 128), dtype=torch.bfloat16)
    on_their_way = attention._decode_stages(items * 8, keys) // 2 * 32 * 2 * 128 * 2
    assert programs * on_their_way <= 228 << 10 < (programs + 1) * on_their_way


@pytest.mark.parametrize("window", [None, 1, 100])
@pytest.mark.parametrize("wanted", [1, 7, 1000])
def test_items_of_decodes_cover_what_is_seen_once(wanted: int, window: int | None) -> None:
    lengths = np.array([1, 128, 129, 5000, 64, 63])
    contexts = Contexts(np.array([9, 4, 3, 2, 1, 0]), np.ones(6, int), lengths, np.arange(6) * 1000)
    found = decode_items(contexts, wanted, window)
    assert len(found) <= max(len(lengths), wanted)
    if window is None and len(lengths) > 2 * wanted:
        assert (np.diff(found[:, 3] - found[:, 2]) <= 0).all()  # those that take longest begin first
    for i, length in enumerate(lengths):
        mine = np.flatnonzero(found[:, 4] == i * 1000)
        own = found[mine]
        assert (own[:, 6:] == [len(mine), mine[0]]).all()
        keys = np.concatenate([np.arange(start, stop) for start, stop in own[:, 2:4]])
        assert keys.tolist() == list(range(0 if window is None else max(0, length - window), length))
        assert (own[:, [0, 1, 4]] == [contexts.rows[i], 1, i * 1000]).all()
