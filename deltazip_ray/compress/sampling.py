"""Calibration without data: sequences sampled from the fine-tune itself (as in LLM-QAT, arXiv 2305.17888).

If there is a chat template, every other sequence is a chat: the template's tokens around a user turn that the model
makes up, then the model's answer. The others start as documents do. Needs memory for the whole fine-tune, which a
calibration file does not.
"""

from collections.abc import Callable
from typing import Any

import torch
from jinja2 import TemplateError
from torch import Tensor

from deltazip_ray.artifact.checkpoint import Checkpoint
from deltazip_ray.compress.options import CompressOptions
from deltazip_ray.compress.skeleton import Skeleton, load_tensors

ROWS = 64
"""Sequences sampled at a time, which limits the KV cache."""
FREE = -1
USER_TOKENS = 48
"""Maximum tokens of a sampled user turn."""


def sample_sequences(
    finetuned: Checkpoint,
    skeleton: Skeleton,
    tokenizer: Any | None,
    options: CompressOptions,
    length: int,
    progress: Callable[[float], None],
) -> list[list[int]]:
    """Sample ``options.samples`` sequences of up to ``length`` tokens; an end-of-sequence token ends them."""
    device = torch.device(options.device)
    weights = load_tensors(finetuned, skeleton.shapes())
    model = skeleton.whole({name: w.to(device, options.torch_dtype) for name, w in weights.items()}, device)
    generator = torch.Generator().manual_seed(options.seed)
    forced = _forced(skeleton, tokenizer, options.samples, length, generator)
    ends = _ends(skeleton)
    sequences: list[list[int]] = []
    draws = torch.Generator(device).manual_seed(options.seed)
    for part in torch.split(forced, ROWS):
        sequences += _sample(model, part.to(device), ends.to(device), draws)
        progress(len(sequences) / options.samples)
    return sequences


def _sample(model: Any, forced: Tensor, ends: Tensor, generator: torch.Generator) -> list[list[int]]:
    """Sample one batch; ``forced`` ``[rows, tokens]`` has the given tokens, and :data:`FREE` where one is sampled."""
    rows, length = forced.shape
    tokens = forced.clone()
    lengths = torch.full((rows,), length, device=forced.device)
    # A sequence may end only after its last given token.
    positions = torch.arange(length, device=forced.device)
    last_given = torch.where(forced == FREE, 0, positions).amax(1)
    cache = None
    with torch.inference_mode():
        for position in range(1, length):
            output = model(input_ids=tokens[:, position - 1 : position], past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            logits = output.logits[:, -1].float()
            open_turn = (position <= last_given)[:, None]
            logits[:, ends] = logits[:, ends].masked_fill(open_turn, -torch.inf)
            drawn = torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]
            given = forced[:, position]
            tokens[:, position] = torch.where(given == FREE, drawn, given)
            ended = (given == FREE) & torch.isin(drawn, ends)
            lengths = torch.where(ended, lengths.clamp_max(position + 1), lengths)
            if bool((lengths <= position + 1).all()):
                break
    return [row[:size] for row, size in zip(tokens.tolist(), lengths.tolist(), strict=True)]


def _forced(skeleton: Skeleton, tokenizer: Any | None, samples: int, length: int, generator: torch.Generator) -> Tensor:
    """The given tokens of all sequences, i64 ``[samples, length]``."""
    forced = torch.full((samples, length), FREE)
    vocab = skeleton.shapes()[skeleton.embedding][0]
    start = skeleton.config.bos_token_id
    if isinstance(start, int) and 0 <= start < vocab:
        forced[:, 0] = start
    else:
        forced[:, 0] = torch.randint(vocab, (samples,), generator=generator)
    turn = None if tokenizer is None else _user_turn(tokenizer)
    if turn is None:
        return forced
    before, after = turn
    longest = min(USER_TOKENS, length - len(before) - len(after) - 1)
    if not before or longest < 1:
        return forced
    said = torch.randint(1, longest + 1, (samples,), generator=generator).tolist()
    for row in range(0, samples, 2):
        answer = len(before) + said[row]
        forced[row, : len(before)] = torch.tensor(before)
        forced[row, answer : answer + len(after)] = torch.tensor(after, dtype=torch.int64)
    return forced


def _user_turn(tokenizer: Any) -> tuple[list[int], list[int]] | None:
    """Tokens before and after the content of a single user turn; None without a template that contains it once."""
    mark = "\u241e calibration \u241e"
    if tokenizer.chat_template is None:
        return None
    try:
        chat = [{"role": "user", "content": mark}]
        text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    except (TemplateError, ValueError, TypeError, KeyError):
        return None
    before, found, after = text.partition(mark)
    if not found or mark in after:
        return None
    encode = [tokenizer(part, add_special_tokens=False)["input_ids"] for part in (before, after)]
    return encode[0], encode[1]


def _ends(skeleton: Skeleton) -> Tensor:
    """Token ids that end a sequence, i64 ``[n]``."""
    ends = skeleton.config.eos_token_id
    found = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
    vocab = skeleton.shapes()[skeleton.embedding][0]
    return torch.tensor([end for end in found if 0 <= end < vocab], dtype=torch.int64)
