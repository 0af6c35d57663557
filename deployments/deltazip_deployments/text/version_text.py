"""The tokenizer, chat template and generation defaults of one version, loaded from its own files."""

import json
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from deltazip_deployments.text.detokenizer import Detokenizer
from deltazip_deployments.text.foreign import blamed_on_files
from deltazip_ray.errors import InvalidRequest, ManifestInvalid, PromptTooLong

_DEFAULTS: Mapping[str, Callable[[float], bool]] = {
    "temperature": lambda value: 0 <= value <= sys.float_info.max,
    "top_p": lambda value: 0 < value <= 1,
    "top_k": lambda value: 0 <= value < 1 << 31,
    "min_p": lambda value: 0 <= value <= 1,
    "repetition_penalty": lambda value: 0.01 <= value <= 10,
}
_LONG_TOKEN = 32  # characters; more than a token of ordinary text ever has


class VersionText:
    """Converts between text and tokens for one version."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, generation: Mapping[str, Any]) -> None:
        self.tokenizer = tokenizer
        self._tokenizer = tokenizer.backend_tokenizer
        # Left on, they would cut prompts silently; and setting them at each call is what makes the
        # transformers wrapper unsafe in threads, so that encoding goes to the tokenizer below it.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._token_texts: dict[int, str] = {}
        added = self._tokenizer.get_added_tokens_decoder()
        self._special = frozenset(token for token, one in added.items() if one.special)
        self._longest = max((len(token) for token in self._tokenizer.get_vocab()), default=0)
        self.end_token_ids = _end_tokens(generation.get("eos_token_id"), tokenizer.eos_token_id)
        self.defaults = _defaults(generation)

    def encode(self, text: str, room: int) -> list[int]:
        """Token ids of a plain prompt, with what the tokenizer puts around one (as a rule: begin of sequence).

        Raises PromptTooLong for a text that cannot be ``room`` tokens or fewer, ManifestInvalid.
        """
        return self._encode(text, room, special=True)

    def encode_chat(self, messages: list[dict[str, str]], room: int) -> list[int]:
        """Token ids of a conversation in the version's own chat template; also raises InvalidRequest."""
        if self.tokenizer.chat_template is None:
            raise InvalidRequest("this model has no chat template: use /v1/completions")
        if len(messages) > room:
            raise PromptTooLong(f"this model's context is {room} tokens; {len(messages)} messages are more than fit")
        self._check_length(sum(len(message["content"]) for message in messages), room)
        with blamed_on_files(InvalidRequest, "the model's chat template refuses these messages"):
            text = str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        return self._encode(text, room, special=False)

    def _encode(self, text: str, room: int, *, special: bool) -> list[int]:
        self._check_length(len(text), room)
        with blamed_on_files(ManifestInvalid, "the version's tokenizer fails at this text"):
            # Unlike `encode`, it lets other threads have the interpreter meanwhile.
            (encoding,) = self._tokenizer.encode_batch_fast([text], add_special_tokens=special)
            return list(encoding.ids)

    def _check_length(self, characters: int, room: int) -> None:
        """Reject prompts that cannot fit before encoding them, which takes seconds and gigabytes for the longest."""
        most = room * max(self._longest, _LONG_TOKEN)
        if characters > most:
            raise PromptTooLong(
                f"this model's context is {room} tokens; the prompt's {characters} characters are more than fit "
                f"({most} at the most): shorten the prompt"
            )

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of a prompt given as tokens."""
        return self._tokenizer.decode(list(tokens), skip_special_tokens=False)

    def token_text(self, token: int) -> str:
        """The text of one token inside a text, also of special ones; incomplete characters as U+FFFD."""
        if token not in self._token_texts:
            # Decoded alone it would lose a leading space.
            once, twice = (self._tokenizer.decode([token] * n, skip_special_tokens=False) for n in (1, 2))
            self._token_texts[token] = twice[len(once) :]
        return self._token_texts[token]

    def detokenizer(self, prompt: Sequence[int]) -> Detokenizer:
        """A decoder for the tokens that follow ``prompt``."""
        return Detokenizer(self._tokenizer, prompt, self._special)


def load_version_text(files: Mapping[str, bytes]) -> VersionText:
    """Load from the bytes of ``tokenizer.json`` and related files, without running any code. Raises ManifestInvalid."""
    if "tokenizer.json" not in files:
        raise ManifestInvalid("the version has no tokenizer.json: publish it again from a checkpoint that has one")
    with blamed_on_files(ManifestInvalid, "the version's tokenizer files cannot be read"):
        generation = json.loads(files.get("generation_config.json", b"{}"))
        with tempfile.TemporaryDirectory(prefix="deltazip-tokenizer-") as folder:
            for name, data in files.items():
                (Path(folder) / name).write_bytes(data)
            tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
        return VersionText(tokenizer, generation if isinstance(generation, dict) else {})


def _defaults(generation: Mapping[str, Any]) -> dict[str, float]:
    defaults: dict[str, float] = {}
    for name, holds in _DEFAULTS.items():
        value = generation.get(name)
        if isinstance(value, int | float):
            if not holds(value):
                raise ManifestInvalid(
                    f"generation_config.json of the version has an impossible {name}: publish it anew"
                )
            defaults[name] = value
    return defaults


def _end_tokens(configured: int | list[int] | None, tokenizers_own: int | None) -> frozenset[int]:
    ids = configured if isinstance(configured, list) else [configured]
    return frozenset(token for token in (*ids, tokenizers_own) if isinstance(token, int))
