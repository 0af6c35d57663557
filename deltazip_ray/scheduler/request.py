"""Requests to the engine and its answers: plain data that crosses processes."""

from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from deltazip_ray.residency.tiers import Tier

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class Structure:
    """The structure that an output's text must match."""

    kind: Literal["json", "json_schema", "regex", "grammar", "choice"]
    text: str = ""
    """The schema as JSON, the regular expression, the grammar as EBNF, the choices as a JSON array; "" for ``json``."""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are sampled.

    The draw at output position ``i`` depends on ``seed`` and ``i`` only, never on other requests in the batch, so that
    a request that moves to another replica continues with the same tokens.
    """

    max_tokens: int = 128
    """Maximum output tokens, including those of an earlier replica (``output_offset``)."""
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    """0: all tokens."""
    min_p: float = 0.0
    """Drops tokens that are less than ``min_p`` times as likely as the likeliest one."""
    seed: int = 0
    stop_token_ids: frozenset[int] = frozenset()
    """Tokens that end the output; the token itself is not returned."""
    ignore_eos: bool = False
    """Do not end at ``stop_token_ids``."""
    min_tokens: int = 0
    """No stop token is sampled before this many output tokens."""
    repetition_penalty: float = 1.0
    """Makes tokens of prompt and output less likely: divides positive logits, multiplies negative ones; 1: off."""
    frequency_penalty: float = 0.0
    """Subtracted from a token's logit for each occurrence in the output."""
    presence_penalty: float = 0.0
    """Subtracted from the logit of tokens that occur in the output."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """(token, addition to its logit), each token at most once."""
    logprobs: int | None = None
    """Number of likeliest tokens to return with each sampled one; None: no log-probabilities at all."""
    prompt_logprobs: int | None = None
    """The same for the tokens of the prompt except the first."""
    structure: Structure | None = None

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken."""
        return self.temperature == 0 or self.top_k == 1

    @property
    def penalized(self) -> bool:
        """Whether any penalty is on."""
        return self.repetition_penalty != 1 or self.frequency_penalty != 0 or self.presence_penalty != 0

    @property
    def sequential(self) -> bool:
        """Whether sampling depends on all tokens before, so that the host must know them first."""
        return self.structure is not None or self.penalized

    @property
    def edits(self) -> bool:
        """Whether logits are modified before sampling."""
        return bool(self.logit_bias) or self.min_tokens > 0 or self.sequential

    @property
    def plain(self) -> bool:
        """Whether only the likeliest token is needed."""
        return self.greedy and self.logprobs is None and not self.edits


class Matcher(Protocol):
    """Follows the structure of one output token by token."""

    def accept(self, token: int) -> None:
        """Advance by ``token``, which was allowed."""

    def allowed(self) -> NDArray[np.int32]:
        """The allowed next tokens: bit ``i % 32`` of word ``i // 32`` is 1 for token ``i``.

        If no token is allowed, the request fails.
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
    """Number of output tokens by an earlier replica; they are at the end of ``prompt``."""
    priority: int = 0
    """Higher first; see :mod:`~deltazip_ray.scheduler.fair_queue`."""
    weight: float = 1.0
    """Weight of the version in fair queueing."""
    matcher: Matcher | None = field(default=None, repr=False, compare=False)
    """Of ``sampling.structure``; made by the engine, never sent to another process."""


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log-probabilities at one position, before any penalty, bias or temperature."""

    chosen: float
    """Of the sampled token, or of the prompt's."""
    best: tuple[tuple[int, float], ...] = ()
    """The likeliest tokens, in order."""
    rank: int | None = None
    """Rank of the token among all, 1 for the likeliest; for prompt tokens only."""


class TokenChunk(NamedTuple):
    """Consecutive output tokens of one request. The last chunk has a finish reason and may have no tokens."""

    tokens: tuple[int, ...]
    finish_reason: FinishReason | None = None
    tier: Tier | None = None
    """On the first chunk only: the tier that the delta was in; ``device`` is warm."""
    logprobs: tuple[TokenLogprobs, ...] = ()
    """If requested: one for each token, and one for ``stop_token``."""
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    """If requested, on the first chunk: one for each prompt token except the first."""
    stop_token: int | None = None
    """On the last chunk, if log-probabilities are requested: the token that ended the output and is not part of it."""
