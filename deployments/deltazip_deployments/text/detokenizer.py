"""Incremental detokenization.

``tokenizers.decoders.DecodeStream`` does this too, but raises on byte-fallback output that is not UTF-8, and repeats
the prompt if that ends inside a character. A model may emit anything, so neither must break a stream.
"""

from collections.abc import Sequence, Set

from tokenizers import Tokenizer

_CONTEXT = 6  # prompt tokens that decide how the first output token reads: a leading space, a pending byte
_INCOMPLETE = "\ufffd"  # what the decoder writes for bytes that are not a character (yet)
_MOST_HELD = 128  # tokens that make no character: more are none, and decoding ever more of them again takes seconds


class Detokenizer:
    """Turns output tokens into text. Returned text never changes, and no character is split."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], special: Set[int] = frozenset()) -> None:
        """``special`` tokens have no text and are skipped."""
        self._tokenizer = tokenizer
        self._special = special
        self._ids = list(prompt[-_CONTEXT:])
        self._read = len(self._ids)

    def feed(self, tokens: Sequence[int]) -> str:
        """The text that ``tokens`` add; empty while a character is incomplete."""
        self._ids.extend(token for token in tokens if token not in self._special)
        before, after = self._texts()
        incomplete = after.endswith(_INCOMPLETE) or len(after) <= len(before)
        if incomplete and len(self._ids) - self._read <= _MOST_HELD:
            return ""
        self._ids = self._ids[self._read :]
        self._read = len(self._ids)
        return after[len(before) :]

    def finish(self) -> str:
        """What was held back as incomplete."""
        before, after = self._texts()
        return after[len(before) :]

    def _texts(self) -> tuple[str, str]:
        before = self._tokenizer.decode(self._ids[: self._read], skip_special_tokens=True)
        return before, self._tokenizer.decode(self._ids, skip_special_tokens=True)
