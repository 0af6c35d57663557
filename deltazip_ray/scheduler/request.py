"""What the engine is asked for and what it answers; plain data that crosses processes."""

from dataclasses import dataclass, field
from typing import Literal

from deltazip_ray.residency.tiers import Tier

FinishReason = Literal["stop", "length"]


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

    @property
    def sequential(self) -> bool:
        """Whether the next draw depends on all tokens before it, so that the host must know them first."""
        return False


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


@dataclass(frozen=True, slots=True)
class TokenChunk:
    """Consecutive output tokens of one request. The last chunk has a finish reason and may have no tokens."""

    tokens: tuple[int, ...]
    finish_reason: FinishReason | None = None
    tier: Tier | None = None
    """On the first chunk only: where the delta was found; ``device`` is warm."""
