"""The tokenizer, chat template and generation defaults of one version, loaded from its own files."""

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerFast

from deltazip_deployments.text.detokenizer import Detokenizer
from deltazip_ray.errors import InvalidRequest, ManifestInvalid

_DEFAULTS = ("temperature", "top_p", "top_k")


class VersionText:
    """What text means to one version."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, generation: Mapping[str, Any]) -> None:
        self._chat = tokenizer
        self._tokenizer = tokenizer.backend_tokenizer
        # Left on, they would cut prompts silently; and setting them at each call is what makes the
        # transformers wrapper unsafe in threads, so that encoding goes to the tokenizer below it.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.end_token_ids = _end_tokens(generation.get("eos_token_id"), tokenizer.eos_token_id)
        self.defaults = {name: generation[name] for name in _DEFAULTS if isinstance(generation.get(name), int | float)}

    def encode(self, text: str) -> list[int]:
        """Token ids of a plain prompt, with what the tokenizer puts around one (as a rule: begin of sequence)."""
        return list(self._tokenizer.encode(text, add_special_tokens=True).ids)

    def encode_chat(self, messages: list[dict[str, str]]) -> list[int]:
        """Token ids of a conversation in the version's own chat template; raises InvalidRequest."""
        if self._chat.chat_template is None:
            raise InvalidRequest("this model has no chat template: use /v1/completions")
        try:
            text = self._chat.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except (TemplateError, TypeError, ValueError) as error:
            raise InvalidRequest(f"the model's chat template refuses these messages: {error}") from error
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def detokenizer(self, prompt: Sequence[int]) -> Detokenizer:
        """A decoder for the tokens that follow ``prompt``."""
        return Detokenizer(self._tokenizer, prompt)


def load_version_text(files: Mapping[str, bytes]) -> VersionText:
    """Load from the bytes of ``tokenizer.json`` and its neighbours; runs no code of theirs. Raises ManifestInvalid."""
    if "tokenizer.json" not in files:
        raise ManifestInvalid("the version has no tokenizer.json: publish it again from a checkpoint that has one")
    try:
        generation = json.loads(files.get("generation_config.json", b"{}"))
        with tempfile.TemporaryDirectory(prefix="deltazip-tokenizer-") as folder:
            for name, data in files.items():
                (Path(folder) / name).write_bytes(data)
            tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise ManifestInvalid(f"the version's tokenizer files cannot be read: {error}") from error
    return VersionText(tokenizer, generation if isinstance(generation, dict) else {})


def _end_tokens(configured: int | list[int] | None, tokenizers_own: int | None) -> frozenset[int]:
    ids = configured if isinstance(configured, list) else [configured]
    return frozenset(token for token in (*ids, tokenizers_own) if isinstance(token, int))
