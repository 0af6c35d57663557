"""Checks that two checkpoints belong together."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from deltazip_ray.artifact.checkpoint import Checkpoint
from deltazip_ray.compress.adapter import AdaptedCheckpoint, LowRank, is_adapter, open_adapter
from deltazip_ray.compress.skeleton import Skeleton
from deltazip_ray.errors import CheckpointInvalid, CheckpointMismatch, listed

FIXED_ROPE = {"default", "linear", "llama3"}
"""Rotary types whose frequencies do not depend on ``max_position_embeddings``."""
SAMPLED = 2**20
"""Elements of a matrix that are compared with the base's."""
RELATED = 0.2
"""Least cosine between the weights of a fine-tune and its base: far below what training does to it, and far above that
of unrelated models."""


@dataclass(frozen=True)
class Pair:
    """A base and a fine-tune of it, checked against each other."""

    base: Checkpoint
    finetuned: Checkpoint
    skeleton: Skeleton
    """The fine-tune's; equal to the base's except for the size of the vocabulary."""
    base_vocab: int
    added: int
    """Rows that the fine-tune adds to the vocabulary."""
    products: Mapping[str, LowRank] = field(default_factory=dict)
    """If the fine-tune is an adapter: the deltas that are products, by weight."""


def open_pair(base: Path, finetuned: Path) -> Pair:
    """Open both checkpoints and check that they belong together; ``finetuned`` may be a LoRA adapter's folder.

    Raises CheckpointInvalid for a broken checkpoint, and CheckpointMismatch when the two differ in more than weights;
    the message lists the differences.
    """
    base_checkpoint = Checkpoint.open(base)
    adapted = is_adapter(finetuned)
    finetuned_checkpoint = open_adapter(finetuned, base_checkpoint) if adapted else Checkpoint.open(finetuned)
    base_skeleton, skeleton = Skeleton(base_checkpoint), Skeleton(finetuned_checkpoint)
    differences = _config_differences(base_skeleton, skeleton)
    if differences:
        raise CheckpointMismatch(f"{finetuned} is not a fine-tune of {base}: " + "; ".join(differences))
    _check_tensors(base_checkpoint, base_skeleton)
    _check_tensors(finetuned_checkpoint, skeleton)
    vocab, base_vocab = skeleton.shapes()[skeleton.embedding][0], base_skeleton.shapes()[skeleton.embedding][0]
    if vocab < base_vocab:
        raise CheckpointMismatch(
            f"{finetuned} has {vocab} tokens, fewer than the {base_vocab} of {base}: a vocabulary may only grow; "
            "keep the base's rows when you resize the embedding"
        )
    if not adapted:
        _check_related(base_checkpoint, finetuned_checkpoint, skeleton)
    products = finetuned_checkpoint.products if isinstance(finetuned_checkpoint, AdaptedCheckpoint) else {}
    return Pair(base_checkpoint, finetuned_checkpoint, skeleton, base_vocab, vocab - base_vocab, products)


def _config_differences(base: Skeleton, finetuned: Skeleton) -> list[str]:
    """Differences between the configs that change the computation, for the message."""
    if base.family is not finetuned.family:
        return [
            f"architecture is {base.family.architecture} in the base, {finetuned.family.architecture} in the fine-tune"
        ]
    keys = list(base.family.config_keys)
    rope: dict[str, Any] = getattr(base.config, "rope_parameters", None) or {}
    if rope.get("rope_type", "default") not in FIXED_ROPE:
        keys.append("max_position_embeddings")
    values = [(key, getattr(base.config, key, None), getattr(finetuned.config, key, None)) for key in keys]
    return [f"{key} is {left} in the base, {right} in the fine-tune" for key, left, right in values if left != right]


def _check_tensors(checkpoint: Checkpoint, skeleton: Skeleton) -> None:
    """Check names and shapes of a checkpoint against its own config."""
    expected, found = skeleton.shapes(), set(checkpoint.names)
    missing = sorted(expected.keys() - found)
    if missing:
        raise CheckpointInvalid(f"{checkpoint.path} has no {listed(missing, 5)}: is it complete?")
    tied_head = f"{skeleton.family.head}.weight"
    unknown = [name for name in sorted(found - expected.keys()) if not name.endswith(skeleton.family.ignored)]
    if skeleton.tied and tied_head in unknown:
        if not checkpoint.tensor(tied_head).equal(checkpoint.tensor(skeleton.embedding)):
            raise CheckpointInvalid(
                f"{checkpoint.path}: config.json ties {tied_head} to {skeleton.embedding}, but they differ: "
                "set tie_word_embeddings to false, or save the checkpoint without the head"
            )
        unknown.remove(tied_head)
    if unknown:
        raise CheckpointInvalid(
            f"{checkpoint.path} has tensors that {skeleton.family.architecture} does not know: {listed(unknown, 5)}; "
            "merge adapters into the weights and save unquantized weights only"
        )
    for name, shape in expected.items():
        if checkpoint.shape(name) != shape:
            raise CheckpointInvalid(
                f"{checkpoint.path}: {name} is {list(checkpoint.shape(name))}, but by config.json it is {list(shape)}"
            )


def _check_related(base: Checkpoint, finetuned: Checkpoint, skeleton: Skeleton) -> None:
    """Raise CheckpointMismatch when no matrix of the first block resembles the base's."""
    prefix, shapes = f"{skeleton.block_name(0)}.", skeleton.shapes()
    names = [name for name, shape in shapes.items() if name.startswith(prefix) and len(shape) == 2]
    if all(_cosine(base.tensor(name), finetuned.tensor(name)) < RELATED for name in names):
        raise CheckpointMismatch(
            f"{finetuned.path} has the shape of {base.path}, but its weights have nothing in common with it: "
            "give the base that it was trained from"
        )


def _cosine(base: Tensor, finetuned: Tensor) -> float:
    """Absolute cosine between the first SAMPLED elements of two weights; 1 if one of them is zero."""
    left, right = (weight.flatten()[:SAMPLED].float() for weight in (base, finetuned))
    size = left.norm() * right.norm()
    return float((left @ right / size).abs()) if size > 0 else 1.0
