"""OpenAI requests, with vLLM's names for additional fields."""

import secrets
from collections.abc import Mapping
from functools import cached_property
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, field_validator, model_validator

from deltazip_deployments.openai.strict import Strict
from deltazip_deployments.openai.structure import ResponseFormat, StructuredOutputs
from deltazip_ray.engine.request_checks import MOST_BIASES, MOST_LOGPROBS, MOST_STRUCTURE_CHARS, MOST_TOP_K
from deltazip_ray.scheduler.request import SamplingParams, Structure

MAX_STOPS = 16
MAX_CHOICES = 32
MAX_MESSAGES = 8192
MAX_PARTS = 1024

_TokenId = Annotated[int, Field(ge=0, lt=1 << 31)]
# Lists fail fast: a body has room for a million mistakes, and telling all of them takes seconds.
_Tokens = Annotated[list[_TokenId], Field(fail_fast=True)]
_Parts = Annotated[list[dict[str, Any]], Field(max_length=MAX_PARTS, fail_fast=True)]


class StreamOptions(Strict):
    """What a stream contains besides the text."""

    include_usage: bool = False
    include_obfuscation: bool = False


class Message(Strict):
    """One turn of a chat. Fields that clients copy from earlier answers are accepted if they are empty."""

    model_config = ConfigDict(extra="allow")

    role: Literal["system", "developer", "user", "assistant"]
    content: str | _Parts | None = None
    name: str | None = None

    @model_validator(mode="after")
    def _only_text(self) -> "Message":
        for field, value in (self.model_extra or {}).items():
            if value not in (None, [], ""):
                raise ValueError(f"messages with {field!r} are not supported")
        for part in self.content if isinstance(self.content, list) else []:
            if part.get("type") != "text" or not isinstance(part.get("text"), str):
                raise ValueError("only content parts of the form {'type': 'text', 'text': …} are supported")
        return self

    def plain(self) -> dict[str, str]:
        """The message as chat templates get it."""
        if isinstance(self.content, list):
            content = "".join(part["text"] for part in self.content)
        else:
            content = self.content or ""
        turn = {"role": self.role, "content": content}
        return turn if self.name is None else turn | {"name": self.name}


class _Sampled(Strict):
    model: str
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1)
    min_p: float | None = Field(None, ge=0, le=1)
    seed: int | None = None
    n: int | None = Field(None, ge=1, le=MAX_CHOICES)
    stop: str | Annotated[list[str], Field(max_length=MAX_STOPS)] | None = None
    stop_token_ids: _Tokens | None = Field(None, max_length=1024)
    min_tokens: int | None = Field(None, ge=0)
    ignore_eos: bool | None = None
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    repetition_penalty: float | None = Field(None, ge=0.01, le=10)
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    prompt_logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)
    priority: int | None = Field(None, ge=-16, le=16)
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @field_validator("stop")
    @classmethod
    def _no_empty_stop(cls, stop: str | list[str] | None) -> str | list[str] | None:
        if stop == "" or (isinstance(stop, list) and not all(stop)):
            raise ValueError("takes no empty string")
        return stop

    @field_validator("logit_bias", mode="before")
    @classmethod
    def _few_biases(cls, bias: Any) -> Any:
        if isinstance(bias, dict) and len(bias) > MOST_BIASES:
            raise ValueError(f"takes up to {MOST_BIASES} tokens")
        return bias

    @field_validator("logit_bias")
    @classmethod
    def _token_ids(cls, bias: dict[str, float] | None) -> dict[str, float] | None:
        # No vocabulary needs ten digits.
        if not all(token.isascii() and token.isdigit() and len(token) < 10 for token in bias or ()):
            raise ValueError('takes token ids as keys: {"50256": -100}')
        return bias

    @model_validator(mode="after")
    def _consistent(self) -> "_Sampled":
        if self.stream_options is not None and not self.stream:
            raise ValueError("'stream_options' needs 'stream': true")
        if self.prompt_logprobs is not None and self.stream:
            raise ValueError("'prompt_logprobs' cannot be streamed")
        if self.min_tokens and self.output_limit and self.min_tokens > self.output_limit:
            raise ValueError("'min_tokens' must be at most 'max_tokens'")
        if self.structure is not None and (self.ignore_eos or self.min_tokens):
            raise ValueError("'min_tokens' and 'ignore_eos' cannot be combined with structured output")
        if self.structure is not None and len(self.structure.text) > MOST_STRUCTURE_CHARS:
            size = len(self.structure.text)
            raise ValueError(f"the structure has {size} characters; at most {MOST_STRUCTURE_CHARS} are compiled")
        if self.structured_outputs is not None and self.response_format is not None:
            raise ValueError("'structured_outputs' and 'response_format' exclude each other")
        return self

    @cached_property
    def structure(self) -> Structure | None:
        """The structure that the output must match."""
        asked = self.structured_outputs or self.response_format
        return None if asked is None else asked.structure()

    @property
    def choices(self) -> int:
        """Number of outputs in the answer."""
        return self.n or 1

    @property
    def candidates(self) -> int:
        """Number of outputs generated, of which the best are returned."""
        return self.choices

    @property
    def likeliest(self) -> int | None:
        """Number of likeliest tokens to return with each token's log-probability; None: no log-probabilities."""
        return None

    @property
    def prompt_likeliest(self) -> int | None:
        """The same for the tokens of the prompt."""
        return self.prompt_logprobs

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def prompt_only(self) -> bool:
        """Whether there is to be no output at all."""
        return False

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with a chunk with token counts."""
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def output_limit(self) -> int | None:
        """Maximum output tokens; None: as many as fit."""
        return self.max_tokens

    def sampling(
        self, *, max_tokens: int, end_token_ids: frozenset[int], defaults: Mapping[str, float]
    ) -> SamplingParams:
        """The engine's parameters; ``defaults`` and ``end_token_ids`` are the version's own.

        Without a seed a random one is used, so that a resumed request continues with the same tokens.
        """
        asked = {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k, "min_p": self.min_p}
        asked |= {"repetition_penalty": self.repetition_penalty}
        chosen = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, **defaults}
        chosen |= {name: value for name, value in asked.items() if value is not None}
        best_is_chosen = self.candidates > self.choices
        return SamplingParams(
            max_tokens=max_tokens,
            temperature=float(chosen["temperature"]),
            top_p=float(chosen["top_p"]),
            top_k=min(max(int(chosen["top_k"]), 0), MOST_TOP_K),
            min_p=float(chosen["min_p"]),
            seed=secrets.randbits(63) if self.seed is None else self.seed & ((1 << 63) - 1),
            stop_token_ids=frozenset(self.stop_token_ids or ()) | (frozenset() if self.ignore_eos else end_token_ids),
            min_tokens=self.min_tokens or 0,
            repetition_penalty=float(chosen["repetition_penalty"]),
            frequency_penalty=self.frequency_penalty or 0.0,
            presence_penalty=self.presence_penalty or 0.0,
            logit_bias=tuple({int(token): value for token, value in (self.logit_bias or {}).items()}.items()),
            logprobs=0 if self.likeliest is None and best_is_chosen else self.likeliest,
            prompt_logprobs=self.prompt_likeliest,
            structure=self.structure,
        )


class CompletionRequest(_Sampled):
    """``POST /v1/completions`` with one prompt."""

    prompt: str | _Tokens
    max_tokens: int | None = Field(16, ge=0)
    best_of: int | None = Field(None, ge=1, le=MAX_CHOICES)
    logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)
    echo: bool | None = None

    @field_validator("prompt", mode="before")
    @classmethod
    def _one_prompt(cls, prompt: Any) -> Any:
        """A list of prompts may contain one."""
        if not isinstance(prompt, list) or not prompt or not isinstance(prompt[0], str | list):
            return prompt
        if len(prompt) > 1:
            raise ValueError("takes one prompt: send a request for each")
        return prompt[0]

    @model_validator(mode="after")
    def _offered(self) -> "CompletionRequest":
        if self.best_of is not None and self.best_of < self.choices:
            raise ValueError("'best_of' must be at least 'n'")
        if self.candidates > self.choices and self.stream:
            raise ValueError("'best_of' above 'n' cannot be streamed")
        if self.prompt_only and not self.echo:
            raise ValueError("'max_tokens' must be at least 1 without 'echo'")
        return self

    @property
    def candidates(self) -> int:
        """``best_of``."""
        return self.best_of or self.choices

    @property
    def likeliest(self) -> int | None:
        """``logprobs``."""
        return self.logprobs

    @property
    def prompt_likeliest(self) -> int | None:
        """``prompt_logprobs``, or ``logprobs`` if the prompt is echoed; the greater of both."""
        wanted = [self.prompt_logprobs, self.logprobs if self.echo else None]
        return max([count for count in wanted if count is not None], default=None)

    @property
    def prompt_only(self) -> bool:
        """Whether there is to be no output at all."""
        return self.max_tokens == 0

    @property
    def output_limit(self) -> int | None:
        """``max_tokens``, at least 1: the engine always samples a token."""
        return 1 if self.prompt_only else self.max_tokens


class ChatRequest(_Sampled):
    """``POST /v1/chat/completions``."""

    messages: list[Message] = Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)

    @model_validator(mode="after")
    def _offered(self) -> "ChatRequest":
        if self.top_logprobs and not self.logprobs:
            raise ValueError("'top_logprobs' needs 'logprobs': true")
        return self

    @property
    def likeliest(self) -> int | None:
        """``top_logprobs``, if ``logprobs`` is on."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def output_limit(self) -> int | None:
        """``max_completion_tokens``, or its older name."""
        return self.max_completion_tokens or self.max_tokens
