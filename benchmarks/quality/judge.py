"""How well a set of weights does a task, and how far it is from the fine-tune: all in float32."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import kl_div, nll_loss
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.quality.data import Batch
from deltazip_deployments.demo.corpus import IGNORED
from deltazip_deployments.demo.tasks import Example
from deltazip_deployments.demo.tokenizer import Frame

ROWS = 512
"""Sequences in one forward pass."""
MORE = 2
"""Tokens that an answer may have beyond the longest right one."""


class Closeness(NamedTuple):
    """One set of weights against the fine-tune, on one set of tokens."""

    kl: float
    """Mean KL(fine-tune ‖ these weights) per token, in nats."""
    kl_standard_error: float
    perplexity: float


class Score(NamedTuple):
    """All that is measured of one set of weights."""

    exact_match: float
    task: Closeness
    """On the tokens of held-out answers."""
    text: Closeness
    """On held-out text."""


class Judge:
    """Holds one model, whose weights are swapped, the fine-tune's predictions, and the held-out data of one task."""

    def __init__(
        self,
        model: LlamaForCausalLM,
        tokenizer: PreTrainedTokenizerFast,
        questions: Sequence[Example],
        answers: Batch,
        windows: Tensor,
        finetuned: Mapping[str, Tensor],
    ) -> None:
        """``answers`` are the questions with their right answers; ``windows`` i64 ``[pieces, tokens]`` of text."""
        self._model, self._tokenizer, self._questions = model.eval(), tokenizer, questions
        device = model.device
        self._prompts, self._padding = _prompts(tokenizer, questions, device)
        self._longest = int((answers.labels != IGNORED).sum(1).max()) + MORE
        labels = windows.clone()
        labels[:, 0] = IGNORED
        self._task = Batch(answers.tokens.to(device), answers.labels.to(device))
        self._text = Batch(windows.to(device), labels.to(device))
        self._load(finetuned)
        self._references = [self._predictions(batch) for batch in (self._task, self._text)]

    @torch.inference_mode()
    def score(self, weights: Mapping[str, Tensor]) -> Score:
        """Measure ``weights``, by name as in a checkpoint."""
        self._load(weights)
        right = sum(text == example.answer for text, example in zip(self._answers(), self._questions, strict=True))
        return Score(
            right / len(self._questions),
            *(
                self._compare(batch, ours)
                for batch, ours in zip((self._task, self._text), self._references, strict=True)
            ),
        )

    @torch.inference_mode()
    def _load(self, weights: Mapping[str, Tensor]) -> None:
        for name, parameter in self._model.named_parameters():
            parameter.copy_(weights[name])

    def _compare(self, batch: Batch, reference: Tensor) -> Closeness:
        found = self._predictions(batch)
        targets = batch.labels[:, 1:]
        each = kl_div(found, reference, reduction="none", log_target=True).sum(-1)
        loss = nll_loss(found, targets[targets != IGNORED])
        return Closeness(float(each.mean()), float(each.std()) / len(each) ** 0.5, float(loss.exp()))

    @torch.inference_mode()
    def _predictions(self, batch: Batch) -> Tensor:
        """Log-probabilities ``[labelled tokens, vocab]`` in front of each label."""
        found = []
        for tokens, labels in zip(torch.split(batch.tokens, ROWS), torch.split(batch.labels, ROWS), strict=True):
            hidden = self._model.model(input_ids=tokens[:, :-1], use_cache=False).last_hidden_state
            found.append(self._model.lm_head(hidden[labels[:, 1:] != IGNORED]).log_softmax(-1))
        return torch.cat(found)

    def _answers(self) -> list[str]:
        """Greedy answers to all questions."""
        texts: list[str] = []
        for prompts, padding in zip(torch.split(self._prompts, ROWS), torch.split(self._padding, ROWS), strict=True):
            texts += self._tokenizer.batch_decode(self._decode(prompts, padding), skip_special_tokens=True)
        return texts

    def _decode(self, prompts: Tensor, padding: Tensor) -> Tensor:
        """The most likely continuations ``[rows, tokens]`` of prompts ``[rows, tokens]`` that are padded at the left.

        ``padding`` counts the padding of each row. What comes after the end is the padding token.
        """
        mask = torch.arange(prompts.shape[1], device=prompts.device) >= padding[:, None]
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        tokens, cache, made = prompts, None, []
        open_rows = torch.ones_like(padding, dtype=torch.bool)
        for _ in range(self._longest):
            output = self._model(
                input_ids=tokens,
                attention_mask=mask.long(),
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            cache = output.past_key_values
            tokens = torch.where(open_rows[:, None], output.logits.argmax(-1), self._tokenizer.pad_token_id)
            made.append(tokens)
            open_rows &= tokens[:, 0] != self._tokenizer.eos_token_id
            if not bool(open_rows.any()):
                break
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
            positions = positions[:, -1:] + 1
        return torch.cat(made, 1)


def _prompts(
    tokenizer: PreTrainedTokenizerFast, questions: Sequence[Example], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Prompts i64 ``[questions, longest]``, padded at the left, and how much padding each has."""
    frame = Frame.of(tokenizer)
    rows = [tokenizer.encode(frame.prompt(question), add_special_tokens=False) for question, _ in questions]
    longest = max(map(len, rows))
    padded = [[tokenizer.pad_token_id] * (longest - len(row)) + row for row in rows]
    return torch.tensor(padded, device=device), torch.tensor([longest - len(row) for row in rows], device=device)
