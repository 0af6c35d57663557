"""Token sequences to calibrate on, and some held out to measure on.

A file is text, or (``.jsonl``) one chat a line: ``{"messages": [{"role": …, "content": …}, …]}``, rendered with the
fine-tune's own chat template; a dataset has such chats, or texts, as rows. Without either the sequences are sampled
from the fine-tune itself.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

from deltazip_ray.artifact.checkpoint import Checkpoint
from deltazip_ray.compress.options import CompressOptions
from deltazip_ray.compress.sampling import sample_sequences
from deltazip_ray.compress.sequences import from_dataset, from_file
from deltazip_ray.compress.skeleton import Skeleton
from deltazip_ray.errors import CompressionError

SHORTEST = 2
"""Tokens: a sequence of one token tells nothing about attention."""


@dataclass(frozen=True)
class Calibration:
    """Sequences, padded at the right: under causal attention padding changes nothing before it."""

    tokens: Tensor
    """i64 ``[sequences, tokens]``."""
    mask: Tensor
    """bool ``[sequences, tokens]``: False is padding."""
    held_out: int
    """The last so many sequences measure quality and are not calibrated on."""
    data: str
    """What this is, for the quality record."""

    @property
    def fitted(self) -> int:
        """The first so many sequences are calibrated on."""
        return self.tokens.shape[0] - self.held_out


def load_calibration(
    finetuned: Checkpoint, skeleton: Skeleton, options: CompressOptions, progress: Callable[[float], None]
) -> Calibration:
    """Read or sample the sequences. Raises CompressionError when a file cannot be used."""
    # Inside one attention window, sliding attention is plain causal attention.
    window = getattr(skeleton.config, "sliding_window", None) or options.sequence_length
    length = min(options.sequence_length, int(skeleton.config.max_position_embeddings), window)
    vocab = skeleton.shapes()[skeleton.embedding][0]
    if options.dataset is not None:
        sequences = list(from_dataset(options.dataset, load_tokenizer(finetuned), length, options))
        data = f"{len(sequences)} sequences of {options.dataset}"
    elif options.calibration is not None:
        sequences = list(from_file(options.calibration, load_tokenizer(finetuned), length, options))
        data = f"{len(sequences)} sequences of {options.calibration.name}"
    else:
        tokenizer = load_tokenizer(finetuned) if "tokenizer.json" in finetuned.files else None
        sequences = sample_sequences(finetuned, skeleton, tokenizer, options, length, progress)
        data = f"{len(sequences)} sequences sampled from the fine-tune, seed {options.seed}"
    sequences = [sequence for sequence in sequences if len(sequence) >= SHORTEST]
    if len(sequences) < 2:
        raise CompressionError(
            f"{options.dataset or options.calibration or finetuned.path} gives {len(sequences)} calibration "
            "sequences, and it takes one to calibrate and one to measure on: give a longer file"
        )
    largest = max(max(sequence) for sequence in sequences)
    if largest >= vocab:
        raise CompressionError(
            f"the tokenizer of {finetuned.path} gives token {largest}, but its embedding has {vocab} rows: "
            "resize the embedding to the tokenizer before you save"
        )
    tokens, mask = _padded(sequences)
    held_out = min(max(1, round(len(sequences) * options.held_out)), len(sequences) - 1)
    return Calibration(tokens, mask, held_out, data)


def load_tokenizer(finetuned: Checkpoint) -> Any:
    """The fine-tune's own tokenizer. Raises CompressionError when transformers cannot load it."""
    folder = finetuned.files["tokenizer.json"].parent if "tokenizer.json" in finetuned.files else finetuned.path
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise CompressionError(f"cannot load the tokenizer of {finetuned.path}: {error}") from error


def _padded(sequences: Sequence[list[int]]) -> tuple[Tensor, Tensor]:
    """Sequences as ``tokens`` and ``mask`` ``[sequences, longest]``."""
    tokens = torch.zeros(len(sequences), max(map(len, sequences)), dtype=torch.int64)
    mask = torch.zeros_like(tokens, dtype=torch.bool)
    for i, sequence in enumerate(sequences):
        tokens[i, : len(sequence)] = torch.tensor(sequence)
        mask[i, : len(sequence)] = True
    return tokens, mask
