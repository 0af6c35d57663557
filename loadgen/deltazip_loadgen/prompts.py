"""What requests say: synthetic words of a given length, or prompts from a pool."""

import hashlib
import math
from pathlib import Path
from typing import Self

import numpy as np
from pydantic import Field, model_validator

from deltazip_loadgen.errors import PoolInvalid
from deltazip_loadgen.spec import Fixed, Lengths, LogNormal, PoolRef, Uniform
from deltazip_loadgen.trace import Endpoint, Frozen, Message, parse_line, read_lines

# Common words, one token each in the usual byte-pair vocabularies.
_WORDS = """
time year people way day man thing woman life child world school state family student group country
problem hand part place case week company system program question work number night point home water
room mother area money story fact month lot right study book eye job word business issue side kind
head house service friend father power hour game line end member law car city community name
president team minute idea body back parent
"""
WORDS = tuple(_WORDS.split())


def sample_length(law: Lengths, rng: np.random.Generator) -> int:
    """One length, at least 1."""
    match law:
        case Fixed(value=value):
            return value
        case Uniform(low=low, high=high):
            return int(rng.integers(low, high, endpoint=True))
        case LogNormal(mean=mean, cv=cv, high=high):
            variance = math.log1p(cv * cv)
            drawn = rng.lognormal(math.log(mean) - variance / 2, math.sqrt(variance))
            return max(1, min(high, round(drawn)))


class Prompt(Frozen):
    """One line of a pool: exactly one of ``messages`` and ``prompt``; a line without a model is for all of them."""

    model: str | None = None
    messages: tuple[Message, ...] | None = Field(None, min_length=1)
    prompt: str | None = None
    max_tokens: int | None = Field(None, ge=1, description="overrides the trace's length distribution")
    tags: dict[str, str] = Field(default_factory=dict)
    expected: str | None = None

    @model_validator(mode="after")
    def _one_form(self) -> Self:
        if (self.messages is None) == (self.prompt is None):
            raise ValueError("a prompt needs either `messages` or `prompt`")
        return self

    @property
    def endpoint(self) -> Endpoint:
        """The endpoint that takes this form."""
        return "chat" if self.messages is not None else "completion"


class PromptPool:
    """Prompts by model, from JSON lines."""

    def __init__(self, ref: PoolRef, prompts: list[Prompt]) -> None:
        self.ref = ref
        self._prompts = prompts

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read and check a pool; raises :class:`PoolInvalid` with the line's number."""
        digest = hashlib.sha256()
        prompts = []
        for number, line in read_lines(path, PoolInvalid):
            digest.update(line + b"\n")
            prompts.append(parse_line(Prompt, line, f"{path}:{number}", PoolInvalid))
        return cls(PoolRef(name=path.name, sha256=digest.hexdigest()), prompts)

    def of(self, model: str) -> list[Prompt]:
        """The prompts that ``model`` may be asked; raises :class:`PoolInvalid` when there is none."""
        found = [prompt for prompt in self._prompts if prompt.model in (None, model)]
        if not found:
            raise PoolInvalid(f"{self.ref.name} has no prompt for model {model!r}; add one, or one without a model")
        return found


class Shuffled:
    """Endless passes over prompts, each pass in a new order, so that all are used equally often."""

    def __init__(self, prompts: list[Prompt], rng: np.random.Generator) -> None:
        self._prompts = prompts
        self._rng = rng
        self._left: list[int] = []

    def next(self) -> Prompt:
        """The next prompt."""
        if not self._left:
            self._left = self._rng.permutation(len(self._prompts)).tolist()
        return self._prompts[self._left.pop()]


def synthetic(endpoint: Endpoint, words: int, rng: np.random.Generator) -> Prompt:
    """A prompt of ``words`` random words, about as many tokens under a byte-pair tokenizer."""
    text = " ".join(WORDS[i] for i in rng.integers(0, len(WORDS), words))
    if endpoint == "chat":
        return Prompt(messages=(Message(role="user", content=text),))
    return Prompt(prompt=text)
