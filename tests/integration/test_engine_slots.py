"""What may go into a slot, and that what may not is refused before a byte is copied."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
import torch

from deltazip_kernels import CODECS, packed_bytes
from deltazip_ray.artifact.manifest import Manifest
from deltazip_ray.config import EngineConfig
from deltazip_ray.engine.core import EngineCore, build_core
from deltazip_ray.errors import BaseMismatch, BlobCorrupt, DeltaTooLarge, DeltaZipError, ManifestInvalid
from deltazip_ray.layers.targets import MatrixTarget
from deltazip_ray.residency.tiers import HostDelta
from tests.support.engines import SETTINGS, random_prompt, running
from tests.support.versions import MemorySource
from tests.support.zoo import Zoo

Q_PROJ = "model.layers.0.self_attn.q_proj.weight"
NORM = "model.layers.0.input_layernorm.weight"


@pytest.fixture(scope="module")
def core(zoo: Zoo) -> EngineCore:
    return build_core(EngineConfig(**SETTINGS), zoo.base)


def changed_entry(manifest: Manifest, name: str, **changes: Any) -> Manifest:
    """The manifest with one tensor's entry changed; ``rename`` gives it another name."""
    blobs = []
    for blob in manifest.blobs:
        tensors = dict(blob.tensors)
        if name in tensors:
            new_name = changes.pop("rename", name)
            tensors[new_name] = tensors.pop(name).model_copy(update=changes)
        blobs.append(blob.model_copy(update={"tensors": tensors}))
    return manifest.model_copy(update={"blobs": tuple(blobs)})


def twice(manifest: Manifest) -> Manifest:
    first, second, *rest = manifest.blobs
    second = second.model_copy(update={"tensors": {**second.tensors, NORM: first.tensors[NORM]}})
    return manifest.model_copy(update={"blobs": (first, second, *rest)})


def without_head_rows(manifest: Manifest) -> Manifest:
    blobs = [
        blob.model_copy(update={"tensors": {n: t for n, t in blob.tensors.items() if n != "lm_head.weight.added"}})
        for blob in manifest.blobs
    ]
    return manifest.model_copy(update={"blobs": tuple(blobs)})


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda m: changed_entry(m, Q_PROJ, rename="model.layers.9.mlp.up_proj.weight"), ManifestInvalid, "layers.9"),
        (lambda m: changed_entry(m, Q_PROJ, shape=(128, 64)), ManifestInvalid, "not \\[128, 128\\]"),
        (lambda m: changed_entry(m, NORM, codec="int4"), ManifestInvalid, "only matrices are coded"),
        (lambda m: m.model_copy(update={"layout_version": 99}), ManifestInvalid, "layout 99"),
        (lambda m: m.model_copy(update={"added_tokens": 3}), ManifestInvalid, "not \\[3, 128\\]"),
        (twice, ManifestInvalid, "twice"),
        (without_head_rows, ManifestInvalid, "no rows lm_head.weight.added"),
        (lambda m: m.model_copy(update={"added_tokens": 65}), (ManifestInvalid, DeltaTooLarge), "65"),
        (
            lambda m: m.model_copy(update={"base": m.base.model_copy(update={"digest": "0" * 64})}),
            BaseMismatch,
            "belongs to base 000000000000",
        ),
    ],
)
def test_a_manifest_that_does_not_fit_the_base_is_refused(
    core: EngineCore,
    zoo: Zoo,
    change: Callable[[Manifest], Manifest],
    error: type[DeltaZipError],
    message: str,
) -> None:
    good = zoo.versions[3].manifest
    core.slots.check(good)
    with pytest.raises(error, match=message):
        core.slots.check(change(good))


def test_the_default_slot_holds_int4_of_everything_and_little_more(zoo: Zoo) -> None:
    core = build_core(EngineConfig(**SETTINGS | {"slot_bytes": None}), zoo.base)
    core.slots.check(zoo.versions[0].manifest)
    assert core.slots.slot_bytes <= zoo.versions[0].manifest.bytes_artifact * 1.1


@pytest.mark.parametrize("codec", CODECS)
def test_int4_is_the_largest_codec(codec: str, core: EngineCore) -> None:
    for target in core.slots.targets.values():
        if target.in_slot:
            shape = (target.shape[0], target.shape[1])
            assert packed_bytes(codec, shape) <= packed_bytes("int4", shape)


def test_a_delta_that_is_larger_than_a_slot_is_refused(zoo: Zoo) -> None:
    core = build_core(EngineConfig(**SETTINGS | {"slot_bytes": 100_000}), zoo.base)
    with pytest.raises(DeltaTooLarge, match=r"of a slot of 100000: raise engine\.slot_bytes"):
        core.slots.check(zoo.versions[0].manifest)


def test_more_added_tokens_than_there_is_room_for_are_refused(zoo: Zoo) -> None:
    core = build_core(EngineConfig(**SETTINGS, max_added_tokens=1), zoo.base)
    with pytest.raises(DeltaTooLarge, match="adds 2 tokens, the engine has room for 1"):
        core.slots.check(zoo.versions[3].manifest)


def test_a_slot_keeps_the_blobs_bytes_and_nothing_of_the_version_before(core: EngineCore, zoo: Zoo) -> None:
    odd, plain = zoo.versions[3], zoo.versions[1]
    for built in (odd, plain):
        core.slots.load(2, HostDelta(built.manifest, {b: memoryview(d) for b, d in built.blobs.items()}, "host"))
    assert core.slots.vocab_size(2) == zoo.versions[1].manifest.base.vocab_size
    memory = core.slots.memory[2]
    for name, target in core.slots.targets.items():
        if isinstance(target, MatrixTarget):
            delta = target.deltas[2]
            assert delta is not None, name
            assert delta.codec == "int2"
            for tensor in delta.tensors.values():
                offset = tensor.data_ptr() - memory.data_ptr()
                assert 0 <= offset <= len(memory) - tensor.nbytes
                assert offset % 256 == 0


def test_a_blob_that_differs_from_its_manifest_leaves_the_slot_empty(core: EngineCore, zoo: Zoo) -> None:
    good = zoo.versions[0]
    views = {block: memoryview(data) for block, data in good.blobs.items()}
    core.slots.load(1, HostDelta(good.manifest, views, "host"))
    with pytest.raises(BlobCorrupt):
        core.slots.load(1, HostDelta(good.manifest, views | {"outer": views["outer"][:-1]}, "host"))
    for target in core.slots.targets.values():
        assert not isinstance(target, MatrixTarget) or target.deltas[1] is None


async def test_a_version_with_nan_fails_only_its_own_requests(zoo: Zoo) -> None:
    # Its bytes agree with its manifest; its arithmetic does not work.
    broken = zoo.versions[0].with_raw({NORM: torch.full((128,), torch.nan)})
    prompt = random_prompt(1, 20)
    async with running(zoo.base, MemorySource(broken, *zoo.versions)) as run:
        bad, *good = await asyncio.gather(
            run.generate(prompt, broken.version),
            *(run.generate(prompt, version) for version in zoo.names[:4]),
            return_exceptions=True,
        )
        again = await run.generate(prompt, zoo.versions[3].version)
    assert isinstance(bad, DeltaZipError)
    assert "not finite" in bad.message
    assert good == [zoo.oracles[version].greedy(prompt, 16) for version in zoo.names[:4]]
    assert again == zoo.oracles[zoo.versions[3].version].greedy(prompt, 16)
