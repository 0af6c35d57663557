"""What the engine is asked for and what it answers; plain data that crosses processes."""

from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from deltazip_ray.residency.tiers import Tier

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class Structure:
    """What the text of an output must match."""

    kind: Literal["json", "json_schema", "regex", "grammar", "choice"]
    text: str = ""
    """The schema as JSON, the regular expression, the grammar as EBNF, the choices as a JSON array; "" for ``json``."""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are drawn.

    The draw of output position ``i`` depends on ``seed`` and ``i`` alone, never on what shares the batch, so a
    request that moves to another replica goes on with the same tokens.
    """

    max_tokens: int = 128
    """Output tokens of the request in all, those of an earlier replica (``output_offset``) included."""
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    """0: all tokens."""
    min_p: float = 0.0
    """Drops tokens that are less than ``min_p`` times as likely as the best one."""
    seed: int = 0
    stop_token_ids: frozenset[int] = frozenset()
    """Tokens that end the output; the token itself is not returned."""
    ignore_eos: bool = False
    """Do not end at ``stop_token_ids``."""
    min_tokens: int = 0
    """No stop token comes before so many output tokens."""
    repetition_penalty: float = 1.0
    """Divides what speaks for tokens of prompt and output; 1: off."""
    frequency_penalty: float = 0.0
    """Taken off a token's logit for each time it is in the output."""
    presence_penalty: float = 0.0
    """Taken off a token's logit once it is in the output."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """Tokens, none twice, and what is added to their logits."""
    logprobs: int | None = None
    """How many of the likeliest tokens to tell beside each drawn one; None: no log-probabilities at all."""
    prompt_logprobs: int | None = None
    """The same for the tokens of the prompt, but the first; None: not at all."""
    structure: Structure | None = None

    @property
    def greedy(self) -> bool:
        """Whether the best token is taken without a draw."""
        return self.temperature == 0 or self.top_k == 1

    @property
    def penalized(self) -> bool:
        """Whether tokens that came before are less likely to come again."""
        return self.repetition_penalty != 1 or self.frequency_penalty != 0 or self.presence_penalty != 0

    @property
    def sequential(self) -> bool:
        """Whether the next draw depends on all tokens before it, so that the host must know them first."""
        return self.structure is not None or self.penalized

    @property
    def edits(self) -> bool:
        """Whether logits are changed before a token is chosen."""
        return bool(self.logit_bias) or self.min_tokens > 0 or self.sequential

    @property
    def plain(self) -> bool:
        """Whether nothing is wanted but the best token."""
        return self.greedy and self.logprobs is None and not self.edits


class Matcher(Protocol):
    """Follows the structure of one output token by token."""

    def accept(self, token: int) -> None:
        """Go on behind ``token``, which was allowed."""

    def allowed(self) -> NDArray[np.int32]:
        """Which tokens may come next: bit ``i % 32`` of word ``i // 32`` is 1 for token ``i``.

        Without any the request fails.
        """


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """One sequence to generate."""

    request_id: str
    version: str | None
    """Digest of the version; None for the base itself."""
    prompt: tuple[int, ...]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    output_offset: int = 0
    """Output tokens that an earlier replica already made; they are at the end of ``prompt``."""
    priority: int = 0
    """Higher goes first; see :mod:`~deltazip_ray.scheduler.fair_queue`."""
    weight: float = 1.0
    """Share of the version in the engine, against that of others that have requests waiting."""
    matcher: Matcher | None = field(default=None, repr=False, compare=False)
    """Of ``sampling.structure``; the engine makes it, and it crosses no process."""


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log-probabilities at one position, before everything that sampling does."""

    chosen: float
    """Of the token that was drawn, or that the prompt has there."""
    best: tuple[tuple[int, float], ...] = ()
    """The likeliest tokens, the best first."""
    rank: int | None = None
    """How likely the token is among all, 1 for the likeliest; told of prompt tokens only."""


class TokenChunk(NamedTuple):
    """Consecutive output tokens of one request. The last chunk has a finish reason and may have no tokens."""

    tokens: tuple[int, ...]
    finish_reason: FinishReason | None = None
    tier: Tier | None = None
    """On the first chunk only: where the delta was found; ``device`` is warm."""
    logprobs: tuple[TokenLogprobs, ...] = ()
    """One for each token, where the request asks for them, and one for ``stop_token``."""
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    """On the first chunk only, where the request asks for them: of each prompt token but the first one."""
    stop_token: int | None = None
    """On the last chunk: the token that ended the output and is not part of it, where its log-probability is told."""
