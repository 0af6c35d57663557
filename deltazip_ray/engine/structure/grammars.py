"""Compiles structures with xgrammar. Structures that are slow to follow are rejected before they reach a step."""

import json
import random
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import xgrammar
from numpy.typing import NDArray

from deltazip_ray.engine.request_checks import MOST_STRUCTURE_CHARS
from deltazip_ray.engine.structure.json_schemas import check_schema
from deltazip_ray.engine.structure.regexes import check_regexes
from deltazip_ray.errors import InvalidRequest
from deltazip_ray.scheduler.request import Structure

_COMPILER_THREADS = 4
_MOST_SPACE = 32  # consecutive white space: otherwise a model may go on with it forever
_TRIAL_TOKENS = 32
_TRIAL_S = 1.0
_TOKEN_S = 0.005  # what following a structure may take for each token, of a processor's time; usually 0.1 to 1 ms
_SURROGATE = re.compile(rb"\xed[\xa0-\xbf]")
_CONTROL = re.compile(rb"[\x00-\x09\x0b-\x1f]")


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """The tokens of a version, and masks of those that xgrammar allows although they are not valid text.

    Masks have bit ``i % 32`` of word ``i // 32`` for token ``i``.
    """

    info: xgrammar.TokenizerInfo
    text: NDArray[np.int32]
    """Existing tokens (xgrammar does not clear the bits after the last one) without surrogates."""
    printable: NDArray[np.int32]
    """Those of ``text`` without control characters except line feeds; xgrammar allows some in JSON strings."""
    no_surrogate: NDArray[np.int32]
    """Tokens that do not complete a surrogate after a token that ends with 0xED."""
    begins_one: frozenset[int]
    """Tokens that end with 0xED."""

    @classmethod
    def of(cls, info: xgrammar.TokenizerInfo) -> "Vocabulary":
        """Takes a fraction of a second for a large one."""
        tokens = info.decoded_vocab
        text = [b"\xed" not in token or not _SURROGATE.search(token) for token in tokens]
        return cls(
            info=info,
            text=_mask(text),
            printable=_mask([ok and not _CONTROL.search(token) for ok, token in zip(text, tokens, strict=True)]),
            no_surrogate=_mask([not b"\xa0" <= token[:1] <= b"\xbf" for token in tokens]),
            begins_one=frozenset(i for i, token in enumerate(tokens) if token.endswith(b"\xed")),
        )


@dataclass(frozen=True)
class Compiled:
    """A structure compiled for one vocabulary."""

    grammar: xgrammar.CompiledGrammar
    vocabulary: Vocabulary
    tokens: NDArray[np.int32]
    """Mask of the tokens that may be used at all."""


class GrammarMatcher:
    """A Matcher. Created in any thread, then used by the step thread only.

    All requests wait for it meanwhile, so it allows no more tokens when it has taken far too long.
    """

    def __init__(self, compiled: Compiled) -> None:
        self._compiled = compiled
        self._matcher = xgrammar.GrammarMatcher(compiled.grammar)
        self._mask = xgrammar.allocate_token_bitmask(1, compiled.vocabulary.info.vocab_size)
        self._words: NDArray[np.int32] = self._mask[0].numpy()
        self._last = -1
        self._left_s = _TRIAL_S

    def accept(self, token: int) -> None:
        """See Matcher."""
        began = time.thread_time()
        self._matcher.accept_token(token)
        self._left_s += _TOKEN_S - (time.thread_time() - began)
        self._last = token

    def allowed(self) -> NDArray[np.int32]:
        """See Matcher."""
        # After an end token that did not end the output, or too slow.
        if self._matcher.is_terminated() or self._left_s < 0:
            self._words[:] = 0
            return self._words
        began = time.thread_time()
        self._matcher.fill_next_token_bitmask(self._mask)
        self._left_s -= time.thread_time() - began
        self._words &= self._compiled.tokens
        if self._last in self._compiled.vocabulary.begins_one:
            self._words &= self._compiled.vocabulary.no_surrogate
        return self._words


def compile_structure(structure: Structure, vocabulary: Vocabulary) -> Compiled:
    """Compile a structure, which takes milliseconds to seconds. Raises InvalidRequest with the reason."""
    if len(structure.text) > MOST_STRUCTURE_CHARS:
        raise InvalidRequest(
            f"the structure has {len(structure.text)} characters; at most {MOST_STRUCTURE_CHARS} are compiled"
        )
    compiler = xgrammar.GrammarCompiler(vocabulary.info, max_threads=_COMPILER_THREADS, cache_enabled=False)
    tokens = vocabulary.printable if structure.kind in ("json", "json_schema") else vocabulary.text
    try:
        compiled = Compiled(compiler.compile_grammar(_parse(structure)), vocabulary, tokens)
        _try(compiled)
    except RuntimeError as error:  # all that xgrammar raises
        raise InvalidRequest(f"the structure cannot be compiled: {_reason(error)}") from error
    return compiled


def _parse(structure: Structure) -> xgrammar.Grammar:
    match structure.kind:
        case "json":
            return xgrammar.Grammar.from_json_schema('{"type": "object"}', max_whitespace_cnt=_MOST_SPACE)
        case "json_schema":
            check_schema(structure.text)
            return xgrammar.Grammar.from_json_schema(structure.text, max_whitespace_cnt=_MOST_SPACE)
        case "regex":
            check_regexes(structure.text)
            return xgrammar.Grammar.from_regex(structure.text)
        case "grammar":
            return xgrammar.Grammar.from_ebnf(structure.text)
        case "choice":
            return xgrammar.Grammar.from_ebnf("root ::= " + " | ".join(map(_literal, json.loads(structure.text))))


def _literal(text: str) -> str:
    """A string literal in EBNF."""
    return json.dumps(text, ensure_ascii=False)


def _try(compiled: Compiled) -> None:
    """Follow one random output, as slow masks would delay the steps of all requests."""
    matcher = GrammarMatcher(compiled)
    chance = random.Random(0)  # noqa: S311
    began = time.perf_counter()
    ends = set(compiled.vocabulary.info.stop_token_ids)
    for made in range(_TRIAL_TOKENS):
        allowed = np.flatnonzero(np.unpackbits(matcher.allowed().view(np.uint8), bitorder="little"))
        if not made and not len(allowed):
            raise InvalidRequest("no text of this model matches the structure")
        going_on = [token for token in chance.sample(allowed.tolist(), min(8, len(allowed))) if token not in ends]
        if not going_on:
            return
        matcher.accept(going_on[0])
        if time.perf_counter() - began > _TRIAL_S:
            raise InvalidRequest("the structure is too slow to follow: make it less ambiguous, with fewer options")


def _reason(error: RuntimeError) -> str:
    """The message without the location in xgrammar's sources."""
    return str(error).strip().splitlines()[-1].split(": ", 1)[-1][:300]


def _mask(bits: Sequence[bool]) -> NDArray[np.int32]:
    padded = np.zeros(-(-len(bits) // 32) * 32, dtype=bool)
    padded[: len(bits)] = bits
    return np.packbits(padded, bitorder="little").view(np.int32)
