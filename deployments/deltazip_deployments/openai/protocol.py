"""OpenAI requests. A field that would change the answer and is not offered is refused by name, never ignored."""

import json
import re
import secrets
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from deltazip_ray.errors import InvalidRequest
from deltazip_ray.scheduler.request import SamplingParams

MAX_BODY_BYTES = 16 << 20
MAX_STOPS = 16
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_MOST_TOP_K = (1 << 31) - 1  # more than any vocabulary; a batch computes with it as a number of the machine

# Accepted and without effect on the answer.
_HARMLESS = frozenset(
    {
        "metadata",
        "parallel_tool_calls",
        "prompt_cache_key",
        "prompt_cache_retention",
        "safety_identifier",
        "service_tier",
        "store",
        "user",
    }
)

# Not offered; the values that ask for nothing are accepted.
_NEUTRAL: Mapping[str, Sequence[Any]] = {
    "audio": (None,),
    "best_of": (None, 1),
    "echo": (None, False),
    "frequency_penalty": (None, 0),
    "function_call": (None, "none", "auto"),
    "functions": (None, []),
    "logit_bias": (None, {}),
    "logprobs": (None, False),
    "min_p": (None, 0),
    "modalities": (None, ["text"]),
    "n": (None, 1),
    "prediction": (None,),
    "presence_penalty": (None, 0),
    "reasoning_effort": (None,),
    "repetition_penalty": (None, 1),
    "response_format": (None, {"type": "text"}),
    "suffix": (None, ""),
    "tool_choice": (None, "none", "auto"),
    "tools": (None, []),
    "top_logprobs": (None, 0),
    "verbosity": (None,),
    "web_search_options": (None,),
}


class InvalidField(InvalidRequest):
    """A request is refused because of one field; ``param`` names it in the answer."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(_Strict):
    """What a stream tells beside the text."""

    include_usage: bool = False
    include_obfuscation: bool = False


class Message(BaseModel):
    """One turn of a chat. Fields that clients echo from earlier answers are accepted while they are empty."""

    model_config = ConfigDict(frozen=True, extra="allow", strict=True)

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[dict[str, Any]] | None = None
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
        """What a chat template sees."""
        if isinstance(self.content, list):
            content = "".join(part["text"] for part in self.content)
        else:
            content = self.content or ""
        turn = {"role": self.role, "content": content}
        return turn if self.name is None else turn | {"name": self.name}


class _Sampled(_Strict):
    model: str
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1)
    seed: int | None = None
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    ignore_eos: bool | None = None

    @field_validator("stop")
    @classmethod
    def _few_stops(cls, stop: str | list[str] | None) -> str | list[str] | None:
        stops = [stop] if isinstance(stop, str) else stop or []
        if len(stops) > MAX_STOPS or not all(stops):
            raise ValueError(f"takes up to {MAX_STOPS} strings, none of them empty")
        return stop

    @model_validator(mode="after")
    def _consistent(self) -> "_Sampled":
        if self.stream_options is not None and not self.stream:
            raise ValueError("'stream_options' needs 'stream': true")
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with a chunk of token counts."""
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def output_limit(self) -> int | None:
        """The most tokens that the client wants; None: as many as fit."""
        return self.max_tokens

    def sampling(
        self, *, max_tokens: int, stop_token_ids: frozenset[int], defaults: Mapping[str, float]
    ) -> SamplingParams:
        """The engine's parameters; ``defaults`` are the version's own. A seed is drawn where none is given,
        so that a resumed request goes on alike.
        """
        asked = {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}
        chosen = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, **defaults}
        chosen |= {name: value for name, value in asked.items() if value is not None}
        seed = secrets.randbits(63) if self.seed is None else self.seed & ((1 << 63) - 1)
        return SamplingParams(
            max_tokens=max_tokens,
            temperature=float(chosen["temperature"]),
            top_p=float(chosen["top_p"]),
            top_k=min(max(int(chosen["top_k"]), 0), _MOST_TOP_K),
            seed=seed,
            stop_token_ids=stop_token_ids,
            ignore_eos=bool(self.ignore_eos),
        )


_TokenId = Annotated[int, Field(ge=0)]


class CompletionRequest(_Sampled):
    """``POST /v1/completions`` with one prompt."""

    prompt: str | list[_TokenId] | list[str] | list[list[_TokenId]]
    max_tokens: int | None = Field(16, ge=1)

    @field_validator("prompt")
    @classmethod
    def _one_prompt(cls, prompt: str | list[Any]) -> str | list[Any]:
        if isinstance(prompt, list) and len(prompt) > 1 and not isinstance(prompt[0], int):
            raise ValueError("takes one prompt: send a request for each")
        return prompt

    @property
    def text_or_tokens(self) -> str | list[int]:
        """The prompt, out of its list of one."""
        first = self.prompt[0] if isinstance(self.prompt, list) and self.prompt else None
        if isinstance(first, str | list):
            return first
        return self.prompt  # type: ignore[return-value]  # a list of prompts was unwrapped above


class ChatRequest(_Sampled):
    """``POST /v1/chat/completions``."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)

    @property
    def output_limit(self) -> int | None:
        """``max_completion_tokens``, or its older name."""
        return self.max_completion_tokens or self.max_tokens


_Request = TypeVar("_Request", CompletionRequest, ChatRequest)


def parse_request(kind: type[_Request], body: bytes) -> _Request:
    """Parse a request body; raises InvalidRequest that names the field and what to do."""
    if len(body) > MAX_BODY_BYTES:
        raise InvalidRequest(f"the body has {len(body)} bytes; at most {MAX_BODY_BYTES} are read")
    try:
        text = body.decode("utf-8-sig")
        data = json.loads(text)
        if _SURROGATE.search(text):
            # Half of a pair is no character: neither tokenizers nor answers can write it.
            json.dumps(data, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"the body is not JSON in UTF-8: {error}") from error
    if not isinstance(data, dict):
        raise InvalidRequest("the body must be a JSON object")
    try:
        return kind.model_validate(_without_unused(kind, data))
    except ValidationError as error:
        raise _first_problem(error) from error


def _without_unused(kind: type[BaseModel], data: dict[str, Any]) -> dict[str, Any]:
    """``data`` without fields that ask for nothing; raises InvalidField for one that asks for what is not offered."""
    kept = {}
    for name, value in data.items():
        if name in kind.model_fields:
            kept[name] = value
        elif name in _NEUTRAL:
            if not any(type(value) in _like(unused) and value == unused for unused in _NEUTRAL[name]):
                raise InvalidField(f"{name!r} is not supported: leave it out", name)
        elif name not in _HARMLESS:
            raise InvalidField(f"unknown field {name[:80]!r}: leave it out", name[:80])
    return kept


def _like(value: Any) -> tuple[type, ...]:
    """Types of JSON values that may equal ``value``: 0 is not False, but it is 0.0."""
    return (int, float) if type(value) is int else (type(value),)


def _first_problem(error: ValidationError) -> InvalidField:
    problem = error.errors(include_url=False, include_input=False)[0]
    location = [str(part) for part in problem["loc"]]
    message = problem["msg"].removeprefix("Value error, ")
    if not location:
        return InvalidField(message, None)
    return InvalidField(f"{'.'.join(location)}: {message}", location[0])
