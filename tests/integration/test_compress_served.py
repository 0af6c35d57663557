"""What the compressor writes for goals and adapters is served as transformers runs the merged weights."""

import asyncio
from pathlib import Path

import torch
from prometheus_client import CollectorRegistry

from deltazip_ray.artifact.artifact import open_artifact
from deltazip_ray.artifact.catalog import Catalog
from deltazip_ray.artifact.file_store import FileStore
from deltazip_ray.compress.merge import merge
from deltazip_ray.compress.options import CompressOptions
from deltazip_ray.compress.pipeline import compress_checkpoint
from deltazip_ray.config import NodeStoreConfig
from deltazip_ray.residency.host_cache import HostCache
from tests.support.adapters import QKVO, make_adapter
from tests.support.engines import GREEDY, random_prompt, running
from tests.support.oracle import Oracle
from tests.support.tiny import make_base, make_finetune

MIXED = {
    "model.embed_tokens.weight": "raw",
    "lm_head.weight": "int3",
    "model.layers.0.self_attn.q_proj.weight": "absent",
    "model.layers.0.self_attn.k_proj.weight": "raw",
    "model.layers.0.self_attn.v_proj.weight": "int1",
    "model.layers.1.mlp.gate_proj.weight": "sparse24_int2",
    "model.layers.1.mlp.up_proj.weight": "absent",
}


async def test_mixtures_and_adapters_share_batches(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    finetuned = make_finetune(base, tmp_path / "finetuned", scale=0.05, added=("<one>",))
    adapter = make_adapter(base, tmp_path / "adapter", modules=(*QKVO, "lm_head"), lora_alpha=40)
    store = FileStore(tmp_path / "store")
    oracles: dict[str, Oracle] = {}
    for source, options in (
        (finetuned, {"target_ratio": 7}),
        (finetuned, {"max_error": 0.02}),
        (finetuned, {"codecs": MIXED}),
        (adapter, {"target_bits": 3}),
    ):
        name = str(len(oracles))
        settings = CompressOptions.model_validate({"samples": 8, "sequence_length": 24} | options)
        manifest = compress_checkpoint(base, source, (tmp_path / name).as_uri(), settings)
        Catalog(store, manifest.base.digest).publish(
            open_artifact(tmp_path / name)[1], manifest, f"variant-{name}", ["latest"]
        )
        merge(base, tmp_path / name, tmp_path / f"{name}-merged", dtype=torch.float32)
        oracles[manifest.version()] = Oracle(tmp_path / f"{name}-merged")
        digest = manifest.base.digest
    cache = HostCache(Catalog(store, digest), bytearray(8 << 20), NodeStoreConfig(fetch_threads=2), CollectorRegistry())
    try:
        async with running(base, cache, slot_bytes=1_000_000) as run:
            versions = [version for version in oracles for _ in range(3)]
            prompts = [random_prompt(i, 5 + 2 * i) for i in range(len(versions))]
            outputs = await asyncio.gather(*map(run.generate, prompts, versions))
            assert run.steps_with(3) > 0
    finally:
        await cache.close()
    for version, prompt, output in zip(versions, prompts, outputs, strict=True):
        assert output == oracles[version].greedy(prompt, GREEDY.max_tokens)
    assert len({tuple(oracle.greedy(prompts[0], GREEDY.max_tokens)) for oracle in oracles.values()}) > 1
