"""The answers of checkpoints under ``transformers``, to which the served answers are compared."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from transformers import GenerationConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from deltazip_deployments.demo.tokenizer import Frame, encode

MAX_ANSWER_TOKENS = 24
_BATCH = 64

Answers = Mapping[str, str]
"""Question to answer."""


class Judge:
    """A checkpoint that answers greedily, with its own chat template."""

    def __init__(self, path: Path) -> None:
        self._tokenizer = PreTrainedTokenizerFast.from_pretrained(path)
        self.model = LlamaForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        self._settings = GenerationConfig(
            max_new_tokens=MAX_ANSWER_TOKENS,
            do_sample=False,
            eos_token_id=self._tokenizer.eos_token_id,
            pad_token_id=self._tokenizer.pad_token_id,
        )

    def answers(self, questions: Sequence[str], advance: Callable[[int], None] = lambda done: None) -> Answers:
        """The answer to each question; ``advance`` is called with the number of questions just answered.

        Prompts of the same length share a batch, so that none is padded.
        """
        frame = Frame.of(self._tokenizer)
        by_length: dict[int, list[tuple[str, list[int]]]] = defaultdict(list)
        prompts = encode(self._tokenizer, [frame.prompt(question) for question in questions])
        for question, tokens in zip(questions, prompts, strict=True):
            by_length[len(tokens)].append((question, tokens))
        found: dict[str, str] = {}
        for group in by_length.values():
            for start in range(0, len(group), _BATCH):
                part = group[start : start + _BATCH]
                found |= zip((question for question, _ in part), self._generate([t for _, t in part]), strict=True)
                advance(len(part))
        return found

    def _generate(self, prompts: Sequence[list[int]]) -> list[str]:
        """Answers to prompts of one length."""
        tokens = torch.tensor(prompts)
        with torch.inference_mode():
            made = self.model.generate(tokens, attention_mask=torch.ones_like(tokens), generation_config=self._settings)
        texts: list[str] = self._tokenizer.batch_decode(made[:, tokens.shape[1] :], skip_special_tokens=True)
        return [text.strip() for text in texts]
