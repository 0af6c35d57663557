"""``python -m benchmarks.attention --json FILE``: attention of the 8B shape on one GPU, layer after layer in a graph.

Decodes: what q|k|v, rotation with the write to the cache, attention and the linear behind it take more than without
attention; with our kernels, over a cache in fp8, and with FlashInfer, whose decodes are not used. Where attention's
programs lie depends on the GEMM ahead: without it, kernels that were 7 us faster gained nothing in steps.
Prefills: attention alone.
Microseconds a layer, medians of nine.
"""

import argparse
import json
from array import array
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import flashinfer
import numpy as np
import torch

from deltazip_kernels.bench.__main__ import commit
from deltazip_kernels.bench.timing import copy_bandwidth, graph_times
from deltazip_kernels.rope import RotaryTables, rope_and_cache
from deltazip_kernels.skinny import BaseProduct
from deltazip_ray.layers.attention.backend import AttentionBackend, SequenceRows
from deltazip_ray.layers.attention.cache import FP8, CacheShape
from deltazip_ray.layers.attention.flashinfer import FlashInferBackend, Prefills
from deltazip_ray.layers.attention.paged import PagedBackend, PagedPlan
from deltazip_ray.layers.attention.tables import cache_rows, page_tables

SHAPE = CacheShape(layers=32, block_size=16, heads=32, kv_heads=8, head_dim=128)
DECODES = {
    "8 x 602": [602] * 8,
    "32 x 602": [602] * 32,
    "256 x 346": [346] * 256,
    "32 of 1 to 2,000": np.random.default_rng(0).integers(1, 2000, 32).tolist(),
    "32 x 4096": [4096] * 32,
    "1 x 2048": [2048],
}
"""Contexts; the second and third are those of the steps that ``benchmarks.engine`` traces."""
PREFILLS = ((16, 512), (4, 2048), (1, 8192))
DTYPE, DEVICE = torch.bfloat16, torch.device("cuda")
WEIGHTS = 8
"""Of each linear, in turn: together several times the L2."""


class FlashInfer(FlashInferBackend):
    """Decodes by FlashInfer too."""

    def plan_prefills(self, sequences: Sequence[SequenceRows], rows: np.ndarray) -> Prefills:
        """Decodes come here, too, see :meth:`plan`."""
        if sequences[0].queries > 1:
            return super().plan_prefills(sequences, rows)
        tables = page_tables(sequences, SHAPE.block_size)
        workspace = torch.empty(256 << 20, dtype=torch.uint8, device=DEVICE)
        # With tensor cores: 1.2 times as fast with 32 sequences as without, twice with 8.
        wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=True)
        arrays = [torch.from_numpy(array) for array in (tables.starts, tables.pages, tables.last)]
        sizes = (SHAPE.heads, SHAPE.kv_heads, SHAPE.head_dim, SHAPE.block_size)
        wrapper.plan(*arrays, *sizes, q_data_type=DTYPE, kv_data_type=DTYPE)
        return Prefills(slice(None), {None: wrapper})

    def plan(self, sequences: Sequence[SequenceRows]) -> PagedPlan[Prefills]:
        """All sequences as prefills."""
        rows = np.cumsum([0, *(sequence.queries for sequence in sequences)])[:-1]
        where = torch.from_numpy(cache_rows(sequences, SHAPE.block_size)).to(DEVICE)
        return PagedPlan(where, None, self.plan_prefills(sequences, rows))


class Setting:
    """A cache full of random numbers, and sequences in blocks anywhere in it, whose last ``queries`` tokens are new."""

    def __init__(self, kind: str, contexts: Sequence[int], queries: int) -> None:
        self.backend = _backend(kind, len(contexts))
        each = [-(-context // SHAPE.block_size) for context in contexts]
        self.backend.allocate(sum(each))
        for layer in self.backend.layers:
            for numbers in (layer.keys, layer.values):
                numbers.copy_(torch.randn(numbers.shape, device=DEVICE))
            if layer.scales is not None:
                layer.scales.fill_(1.0)
        blocks = [array("i", part.tolist()) for part in torch.randperm(sum(each)).split(each)]
        sequences = [SequenceRows(queries, context, own) for context, own in zip(contexts, blocks, strict=True)]
        self.plan = self.backend.plan(sequences)
        self.qkv = torch.randn(len(contexts) * queries, 48 * 128, device=DEVICE, dtype=DTYPE)
        self.x, self.y = torch.randn(2, len(self.qkv), 4096, device=DEVICE, dtype=DTYPE)
        self.q = self.qkv[:, :4096].contiguous().view(-1, 32, 128)
        self.positions = torch.cat([torch.arange(n - queries, n, device=DEVICE) for n in contexts])
        half = torch.rand(max(contexts), 64, device=DEVICE)
        self.tables = RotaryTables(half, half)

    def decode(self) -> dict[str, Any]:
        """What attention adds to the launches around it."""
        product = BaseProduct(DEVICE)
        ahead = 0.01 * torch.randn(WEIGHTS, 6144, 4096, device=DEVICE, dtype=DTYPE)
        behind = 0.01 * torch.randn(WEIGHTS, 4096, 4096, device=DEVICE, dtype=DTYPE)

        def run(layer: int, *, whole: bool) -> None:
            kv = self.backend.layers[layer]
            product(self.qkv, self.x, ahead[layer % WEIGHTS])
            q = rope_and_cache(
                self.qkv, self.positions, self.tables, kv.keys, kv.values, self.plan.where, None, kv.scales
            )
            found = self.backend.attend(layer, q, self.plan) if whole else q.flatten(1)
            product(self.y, found, behind[layer % WEIGHTS])

        found, others = (_times(partial(run, whole=whole)) for whole in (True, False))
        return {"us": found["us"] - others["us"], "whole": found, "without": others}

    def prefill(self) -> dict[str, Any]:
        """Attention alone."""
        return _times(lambda layer: self.backend.attend(layer, self.q, self.plan))


def _backend(kind: str, count: int) -> AttentionBackend[Any]:
    if kind == "flashinfer":
        return FlashInfer(SHAPE, DTYPE, DEVICE, decodes=count)
    return PagedBackend(SHAPE, DTYPE, DEVICE, FP8 if kind == "fp8" else DTYPE, decodes=count)


def _times(run: Callable[[int], object]) -> dict[str, Any]:
    """Of ``run`` for each layer in turn."""
    samples = [1e6 * s for s in graph_times([partial(run, i) for i in range(SHAPE.layers)])]
    return {"us": median(samples), "samples": samples}


def measure(kinds: Sequence[str]) -> dict[str, Any]:
    """All of it."""
    bandwidth = copy_bandwidth()
    found: dict[str, Any] = {"bandwidth": bandwidth, "decodes": {}, "prefills": {}}
    for name, contexts in DECODES.items():
        size = 2 * sum(contexts) * SHAPE.kv_heads * SHAPE.head_dim * 2
        row: dict[str, Any] = {"limit_us": 1e6 * size / bandwidth}
        row |= {kind: Setting(kind, contexts, 1).decode() for kind in kinds}
        found["decodes"][name] = row
    for count, context in PREFILLS:
        row = {"flops": 4 * count * context * (context + 1) / 2 * SHAPE.heads * SHAPE.head_dim}
        row |= {kind: Setting(kind, [context] * count, context).prefill() for kind in kinds}
        found["prefills"][f"{count} x {context}"] = row
    return found


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--commit", help="of this tree, where it is no checkout")
    parser.add_argument("--kinds", default="triton,fp8,flashinfer")
    options = parser.parse_args()
    found = measure(options.kinds.split(","))
    machine = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__}
    report = {"commit": options.commit or commit(), "machine": machine} | found
    options.json.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
