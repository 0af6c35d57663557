"""Every family through the whole system: half-precision shards, compressor, store, engine; and through the kernels."""

import asyncio
import copy
from pathlib import Path

import pytest
import torch
from prometheus_client import CollectorRegistry

from deltazip_ray.artifact.artifact import open_artifact
from deltazip_ray.artifact.catalog import Catalog
from deltazip_ray.artifact.file_store import FileStore
from deltazip_ray.compress.merge import merge
from deltazip_ray.compress.options import CompressOptions
from deltazip_ray.compress.pipeline import compress_checkpoint
from deltazip_ray.config import EngineConfig, NodeStoreConfig
from deltazip_ray.engine.core import build_core
from deltazip_ray.residency.host_cache import HostCache
from tests.integration.test_engine_cuda import SETTINGS as ON_A_GPU
from tests.integration.test_engine_cuda import all_of
from tests.integration.test_engine_logits import last_logits, load
from tests.support.engines import GREEDY, SETTINGS, random_prompt, running
from tests.support.families import CONFIGS, save_model
from tests.support.oracle import Oracle
from tests.support.versions import MemorySource, build_version
from tests.support.zoo import Zoo

STORED = {
    "MistralForCausalLM": torch.float32,
    "Qwen3ForCausalLM": torch.float16,
    "Gemma2ForCausalLM": torch.bfloat16,
    "GPTNeoXForCausalLM": torch.float16,
}


@pytest.mark.parametrize("architecture", STORED)
async def test_compressed_and_served(architecture: str, tmp_path: Path) -> None:
    config, dtype = copy.deepcopy(CONFIGS[architecture]), STORED[architecture]
    # A random tied model says its last token again, whatever its version.
    config.tie_word_embeddings = False
    base = save_model(tmp_path / "base", config, dtype=dtype, shards="200KB")
    assert len(list(base.glob("model-*.safetensors"))) > 2
    store = FileStore(tmp_path / "store")
    oracles: dict[str | None, Oracle] = {None: Oracle(base)}
    for name, moved, added in (("grown", 0.05, 2), ("same", -0.05, 0)):
        tuned = save_model(tmp_path / name, config, moved, added=added, dtype=dtype, shards="200KB")
        options = CompressOptions(samples=8, sequence_length=24)
        manifest = compress_checkpoint(base, tuned, (tmp_path / f"{name}-artifact").as_uri(), options)
        catalog = Catalog(store, manifest.base.digest)
        catalog.publish(open_artifact(tmp_path / f"{name}-artifact")[1], manifest, name, ["latest"])
        merge(base, tmp_path / f"{name}-artifact", tmp_path / f"{name}-merged", dtype=torch.float32)
        oracles[manifest.version()] = Oracle(tmp_path / f"{name}-merged")
    cache = HostCache(catalog, bytearray(8 << 20), NodeStoreConfig(fetch_threads=2), CollectorRegistry())
    try:
        async with running(base, cache, slot_bytes=1_000_000, max_batch_tokens=48) as run:
            versions = [version for version in oracles for _ in range(4)]
            prompts = [random_prompt(i, 5 + 7 * i) for i in range(len(versions))]
            outputs = await asyncio.gather(*map(run.generate, prompts, versions))
            assert run.steps_with(2) > 0
    finally:
        await cache.close()
    expected = [
        oracles[version].greedy(prompt, GREEDY.max_tokens) for version, prompt in zip(versions, prompts, strict=True)
    ]
    assert outputs == expected
    assert len({tuple(oracle.greedy(prompts[0], GREEDY.max_tokens)) for oracle in oracles.values()}) == len(oracles)


@pytest.mark.parametrize("architecture", CONFIGS)
def test_the_kernels_compute_every_family(architecture: str, tmp_path: Path) -> None:
    base = save_model(tmp_path / "base", CONFIGS[architecture])
    built = build_version(base, save_model(tmp_path / "tuned", CONFIGS[architecture], moved=0.02))
    core = build_core(EngineConfig(**SETTINGS, kernels="triton", attention="triton"), base)
    load(core, 0, built)
    prompts = [random_prompt(i, 3 + 2 * i) for i in range(4)]
    logits = last_logits(core, prompts, [-1, -1, 0, 0])
    oracles = [Oracle(base)] * 2 + [Oracle(built.write_merged(tmp_path / "merged"))] * 2
    exact = torch.stack([oracle.logits(prompt)[-1] for oracle, prompt in zip(oracles, prompts, strict=True)])
    torch.testing.assert_close(logits[:2], exact[:2], atol=1e-4, rtol=1e-4)
    # The version's deltas see activations that are rounded to 8 bits.
    assert (logits[2:] - exact[2:]).square().mean().sqrt() < 0.03 * exact.std()


@pytest.mark.gpu
@pytest.mark.parametrize("architecture", CONFIGS)
async def test_every_family_on_a_gpu(architecture: str, tmp_path: Path) -> None:
    config = copy.deepcopy(CONFIGS[architecture])
    # Heads of 128, as those of the other GPU tests, whose kernels FlashInfer then has compiled.
    config.hidden_size, config.tie_word_embeddings = 512, False
    if hasattr(config, "head_dim"):
        config.head_dim = 128
    base = save_model(tmp_path / "base", config)
    built = build_version(base, save_model(tmp_path / "tuned", config, moved=0.02))
    oracles: dict[str | None, Oracle] = {None: Oracle(base)}
    oracles[built.version] = Oracle(built.write_merged(tmp_path / "merged"))
    zoo = Zoo(base, FileStore(tmp_path / "store"), (built,), oracles)
    async with running(base, MemorySource(built), **ON_A_GPU) as run:
        # As in test_engine_cuda; prompts and answers are several windows long.
        assert await all_of(run, zoo, 12, 24) < 0.3
