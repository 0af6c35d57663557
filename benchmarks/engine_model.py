"""An engine over random weights of a real model's shape: speed does not depend on their values."""

import gc
import mmap
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from prometheus_client import CollectorRegistry

from deltazip_kernels import LAYOUT_VERSION, packed_layout
from deltazip_ray.artifact.blob import write_blob
from deltazip_ray.artifact.digests import sha256_hex
from deltazip_ray.artifact.manifest import BaseRef, BlobEntry, Manifest, TensorEntry
from deltazip_ray.config import EngineConfig
from deltazip_ray.engine.async_engine import AsyncEngine
from deltazip_ray.engine.core import EngineCore, assemble
from deltazip_ray.models.decoder_config import DecoderConfig, read_decoder_config
from deltazip_ray.residency.tiers import HostDelta, HostMemory

DIGEST = "0" * 64
SHAPES = {
    "8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "max_position_embeddings": 8192,
    },
    "tiny": {
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "vocab_size": 512,
        "max_position_embeddings": 2048,
    },
}


def decoder_shape(name: str) -> DecoderConfig:
    """The shape of Llama 3.1 8B, or a tiny one."""
    return read_decoder_config({"architectures": ["LlamaForCausalLM"], "model_type": "llama", **SHAPES[name]})


@dataclass(frozen=True)
class RandomWeights:
    """Normal weights of the right size, made on the device; a norm's are ones."""

    shapes: Mapping[str, tuple[int, ...]]
    device: torch.device

    def shape(self, name: str) -> tuple[int, ...]:
        """Of one tensor."""
        return self.shapes[name]

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor."""
        shape = self.shapes[name]
        if len(shape) == 1:
            return torch.ones(shape, device=self.device)
        return torch.randn(shape, device=self.device, dtype=torch.bfloat16).mul_(shape[-1] ** -0.5)


def weight_shapes(shape: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """All tensors of a Llama checkpoint, by name."""
    hidden, inner, kv = shape.hidden_size, shape.intermediate_size, shape.kv_heads * shape.head_dim
    queries = shape.heads * shape.head_dim
    tensors: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (shape.vocab_size, hidden),
        "lm_head.weight": (shape.vocab_size, hidden),
        "model.norm.weight": (hidden,),
    }
    for i in range(shape.layers):
        block = f"model.layers.{i}"
        tensors |= {
            f"{block}.self_attn.q_proj.weight": (queries, hidden),
            f"{block}.self_attn.k_proj.weight": (kv, hidden),
            f"{block}.self_attn.v_proj.weight": (kv, hidden),
            f"{block}.self_attn.o_proj.weight": (hidden, queries),
            f"{block}.mlp.gate_proj.weight": (inner, hidden),
            f"{block}.mlp.up_proj.weight": (inner, hidden),
            f"{block}.mlp.down_proj.weight": (hidden, inner),
            f"{block}.input_layernorm.weight": (hidden,),
            f"{block}.post_attention_layernorm.weight": (hidden,),
        }
    return tensors


def random_delta(shape: DecoderConfig, codec: str, *, outer: bool) -> HostDelta:
    """A delta of every matrix of the blocks, and of embedding and head with ``outer``, all in ``codec``."""
    generator = torch.Generator().manual_seed(0)
    blocks: dict[str, dict[str, TensorEntry]] = {}
    for name, dims in weight_shapes(shape).items():
        if len(dims) == 2 and (outer or ".layers." in name):
            block = "layers." + name.split(".")[2] if ".layers." in name else "outer"
            entry = TensorEntry(codec=codec, shape=dims, bytes_finetuned=2 * dims[0] * dims[1])
            blocks.setdefault(block, {})[name] = entry
    made: dict[tuple[int, ...], dict[str, torch.Tensor]] = {}
    blobs, entries = {}, []
    for block, tensors in blocks.items():
        parts: dict[str, torch.Tensor] = {}
        for name, entry in tensors.items():
            dims = entry.shape
            if dims not in made:
                made[dims] = _random_parts(codec, (dims[0], dims[1]), generator)
            parts |= {f"{name}.{part}": tensor for part, tensor in made[dims].items()}
        data = write_blob(parts)
        blobs[block] = memoryview(data)
        entries.append(BlobEntry(block=block, digest=sha256_hex(block.encode()), size=len(data), tensors=tensors))
    base = BaseRef(digest=DIGEST, architecture="LlamaForCausalLM", vocab_size=shape.vocab_size)
    manifest = Manifest(layout_version=LAYOUT_VERSION, base=base, bytes_finetuned=0, blobs=tuple(entries))
    return HostDelta(manifest, blobs, "host")


def _random_parts(codec: str, dims: tuple[int, int], generator: torch.Generator) -> dict[str, torch.Tensor]:
    parts = {}
    for name, (size, dtype) in packed_layout(codec, dims).items():
        if dtype == torch.uint8:
            parts[name] = torch.randint(0, 256, size, dtype=dtype, generator=generator)
        else:
            parts[name] = (torch.rand(size, generator=generator) * 1e-3).to(dtype)
    return parts


@dataclass
class RandomVersions:
    """A source that has every version, all with the same bytes: slots don't know."""

    delta: HostDelta
    acquired: int = field(default=0)

    async def acquire(self, version: str) -> HostDelta:
        """At once."""
        self.acquired += 1
        return self.delta

    async def release(self, version: str) -> None:
        """Nothing to do."""

    async def prefetch(self, version: str) -> bool:
        """It is there."""
        return True

    async def discard(self, version: str, *, disk: bool = False) -> None:
        """Nothing to do."""

    def seconds_away(self, version: str) -> float:
        """None."""
        return 0.0


def in_arena(delta: HostDelta) -> HostDelta:
    """The same delta in one piece of memory, as in a node store's arena: the device may register it."""
    sizes = {block: -(-len(data) // mmap.PAGESIZE) * mmap.PAGESIZE for block, data in delta.blobs.items()}
    view = memoryview(mmap.mmap(-1, sum(sizes.values())))
    blobs, start = {}, 0
    for block, data in delta.blobs.items():
        blobs[block] = view[start : start + len(data)]
        blobs[block][:] = data
        start += sizes[block]
    return HostDelta(delta.manifest, blobs, "host", HostMemory(view))


def build(shape: DecoderConfig, config: EngineConfig, _base: Path) -> EngineCore:
    """An engine's core over random weights."""
    weights = RandomWeights(weight_shapes(shape), torch.device(config.device))
    return assemble(config, shape, weights, DIGEST)


async def started(
    shape: DecoderConfig, config: EngineConfig, source: RandomVersions
) -> tuple[AsyncEngine, CollectorRegistry]:
    """A running engine and its metrics."""
    registry = CollectorRegistry()
    engine = AsyncEngine(config, Path(), source, registry, build=partial(build, shape))
    await engine.start()
    gc.collect()
    gc.freeze()  # as replicas do
    return engine, registry
