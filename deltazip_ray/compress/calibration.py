"""Token sequences for calibration, of which some are held out to measure quality.

A file is text, or (``.jsonl``) one chat a line: ``{"messages": [{"role": …, "content": …}, …]}``, rendered with the
fine-tune's own chat template. The rows of a dataset are such chats, or texts. Without either, the sequences are sampled
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
"""In tokens: attention does nothing in a sequence of one."""


@dataclass(frozen=True)
class Calibration:
    """Sequences, padded on the right, where causal attention keeps padding from affecting anything."""

    tokens: Tensor
    """i64 ``[sequences, tokens]``."""
    mask: Tensor
    """bool ``[sequences, tokens]``: False is padding."""
    held_out: int
    """Number of sequences, at the end, that measure quality and are not used for calibration."""
    data: str
    """Description for the quality record."""

    @property
    def fitted(self) -> int:
        """Number of sequences, at the beginning, that are used for calibration."""
        return self.tokens.shape[0] - self.held_out


def load_calibration(
    finetuned: Checkpoint, skeleton: Skeleton, options: CompressOptions, progress: Callable[[float], None]
) -> Calibration:
    """Read or sample the sequences. Raises CompressionError when a file cannot be used."""
    # Within one window, sliding-window attention is plain causal attention.
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
            "sequences, but one to calibrate on and one to measure with are needed: give a longer file"
        )
    largest = max(max(sequence) for sequence in sequences)
    if largest >= vocab:
        raise CompressionError(
            f"the tokenizer of {finetuned.path} gives token {largest}, but its embedding has {vocab} rows: "
            "resize the embedding before you save the checkpoint"
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
