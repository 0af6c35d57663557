"""Text out of tokens: nothing lost, no character split, stop strings never shown."""

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

from deltazip_deployments.text.detokenizer import Detokenizer
from deltazip_deployments.text.output import OutputText
from deltazip_deployments.text.stops import StopStrings


def byte_level() -> Tokenizer:
    """Every byte a token, as in byte-level BPE."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def byte_fallback() -> Tokenizer:
    """Words with a leading space mark, and bytes for the rest, as in SentencePiece models."""
    vocab = {"<unk>": 0, "<s>": 1} | {f"<0x{i:02X}>": 2 + i for i in range(256)}
    vocab |= {word: 258 + i for i, word in enumerate(["▁the", "▁a", "he", "llo", "▁", "é", "x"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True, unk_token="<unk>"))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(Regex("▁"), " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<s>"])
    return tokenizer


BYTE_LEVEL, BYTE_FALLBACK = byte_level(), byte_fallback()


@given(text=st.text(max_size=30), cuts=st.lists(st.integers(0, 90), max_size=6))
@settings(max_examples=150, deadline=None)
def test_any_grouping_of_tokens_gives_the_whole_text_and_no_broken_character(text: str, cuts: list[int]) -> None:
    ids = BYTE_LEVEL.encode(text).ids
    detokenizer = Detokenizer(BYTE_LEVEL, ())
    edges = sorted({0, len(ids), *(cut for cut in cuts if cut < len(ids))})
    pieces = [detokenizer.feed(ids[a:b]) for a, b in pairwise(edges)]
    assert "".join(pieces) + detokenizer.finish() == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


@given(ids=st.lists(st.integers(0, 264), max_size=40), prompt=st.lists(st.integers(0, 264), max_size=8))
@settings(max_examples=200, deadline=None)
def test_whatever_a_model_emits_is_decoded(ids: list[int], prompt: list[int]) -> None:
    detokenizer = Detokenizer(BYTE_FALLBACK, prompt)
    text = "".join([*(detokenizer.feed([token]) for token in ids), detokenizer.finish()])
    assert len(text) <= len(BYTE_FALLBACK.decode([*prompt, *ids]))


def test_a_leading_space_depends_on_what_came_before() -> None:
    the = BYTE_FALLBACK.token_to_id("▁the")
    assert Detokenizer(BYTE_FALLBACK, ()).feed([the]) == "the"
    assert Detokenizer(BYTE_FALLBACK, [the]).feed([the]) == " the"


class Counted:
    """A tokenizer, and how many tokens it was asked to decode."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.tokens = 0

    def decode(self, ids: list[int], *, skip_special_tokens: bool) -> str:
        self.tokens += len(ids)
        return self._tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)


@pytest.mark.parametrize("token", [1, BYTE_FALLBACK.token_to_id("<0xE2>")], ids=["special", "half a character"])
def test_an_endless_output_without_text_costs_no_more_a_token_than_a_short_one(token: int) -> None:
    counted: Any = Counted(BYTE_FALLBACK)
    detokenizer = Detokenizer(counted, (), special={1})
    for _ in range(3000):
        detokenizer.feed([token])
    assert counted.tokens < 3000 * 500
    the = BYTE_FALLBACK.token_to_id("▁the")
    assert (detokenizer.feed([the]) + detokenizer.finish()).endswith("the")


@pytest.mark.parametrize("known", [frozenset[int](), frozenset({1})])
def test_special_tokens_are_not_text(known: frozenset[int]) -> None:
    detokenizer = Detokenizer(BYTE_FALLBACK, [1], known)
    assert detokenizer.feed([BYTE_FALLBACK.token_to_id("he"), 1, BYTE_FALLBACK.token_to_id("llo")]) == "hello"


@given(
    text=st.text(alphabet="ab#", max_size=30),
    stops=st.lists(st.text(alphabet="ab#", min_size=1, max_size=4), max_size=3).map(tuple),
    size=st.integers(1, 5),
)
@settings(max_examples=300, deadline=None)
def test_stop_strings_cut_at_the_first_and_hold_back_no_more_than_needed(
    text: str, stops: tuple[str, ...], size: int
) -> None:
    matcher = StopStrings(stops)
    shown, seen = "", ""
    for at in range(0, len(text), size):
        seen += text[at : at + size]
        shown += matcher.feed(text[at : at + size])
        held = seen[len(shown) :]
        assert not any(stop in shown for stop in stops)
        assert matcher.stopped or not held or any(stop.startswith(held) and stop != held for stop in stops)
        if matcher.stopped:
            break
    shown += matcher.finish()
    ends = [text.find(stop) for stop in stops if stop in text]
    # Of two stop strings the one that is complete first ends the text, even when the other begins earlier.
    assert text.startswith(shown)
    assert matcher.stopped == bool(ends)
    assert matcher.stopped or shown == text
    if size == 1 and len(set(map(len, stops))) == 1 and ends:
        assert shown == text[: min(ends)]


@pytest.mark.parametrize("group", [1, 2, 7])
def test_output_text_stops_across_tokens(group: int) -> None:
    ids = BYTE_LEVEL.encode("héllo wörld END and more").ids
    text = OutputText(Detokenizer(BYTE_LEVEL, ()), ("END",))
    shown = ""
    for at in range(0, len(ids), group):
        shown += text.feed(ids[at : at + group])
        if text.stopped:
            break
    assert text.stopped
    assert shown + text.finish() == "héllo wörld "


def test_output_text_gives_back_a_stop_string_that_did_not_come() -> None:
    text = OutputText(Detokenizer(BYTE_LEVEL, ()), ("END",))
    shown = text.feed(BYTE_LEVEL.encode("the EN").ids)
    assert shown == "the "
    assert text.finish() == "EN"
    assert not text.stopped
