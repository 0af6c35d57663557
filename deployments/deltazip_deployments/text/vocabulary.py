"""Vocabularies for structured output."""

from collections.abc import Callable
from functools import cached_property
from pathlib import Path

import xgrammar
from transformers import PreTrainedTokenizerFast

from deltazip_deployments.text.foreign import blamed_on_files
from deltazip_deployments.text.version_files import base_files, version_files
from deltazip_deployments.text.version_text import load_version_text
from deltazip_ray.artifact.catalog import Catalog
from deltazip_ray.artifact.store import open_store
from deltazip_ray.config import AppConfig
from deltazip_ray.errors import InvalidRequest, ManifestInvalid


class Vocabularies:
    """Loads vocabularies: the versions' from the store, the base's from its folder."""

    def __init__(self, config: AppConfig, base_digest: Callable[[], str]) -> None:
        self._config = config
        self._base_digest = base_digest

    @cached_property
    def _catalog(self) -> Catalog:
        """Created once: making a boto3 client holds the GIL for about 50 ms, which delays steps."""
        return Catalog(open_store(self._config.store), self._base_digest())

    def load(self, version: str | None) -> xgrammar.TokenizerInfo:
        """Blocking. Raises InvalidRequest if there is no end token, ManifestInvalid, StoreError, ConfigError."""
        files = base_files(Path(self._config.base))
        if version is not None:
            files = version_files(self._catalog, version, files)
        text = load_version_text(files)
        with blamed_on_files(ManifestInvalid, "structured output cannot use the version's tokenizer"):
            return make_vocabulary(text.tokenizer, text.end_token_ids)


def make_vocabulary(tokenizer: PreTrainedTokenizerFast, end_token_ids: frozenset[int]) -> xgrammar.TokenizerInfo:
    """The tokens with their bytes. Special tokens have no text; only the end tokens may occur, at the end."""
    if not end_token_ids:
        raise InvalidRequest("this model has no end token, so structured output could never end: leave it out")
    ends = sorted(end_token_ids)
    kind = xgrammar.TokenizerInfo.from_huggingface(tokenizer, stop_token_ids=ends)
    special = {*tokenizer.all_special_ids, *(i for i, token in tokenizer.added_tokens_decoder.items() if token.special)}
    tokens = {i: token for token, i in tokenizer.get_vocab().items() if i not in special}
    size = max(kind.vocab_size, ends[-1] + 1)
    return xgrammar.TokenizerInfo(
        [tokens.get(i, "") for i in range(size)],
        vocab_type=kind.vocab_type,
        vocab_size=size,
        stop_token_ids=ends,
        add_prefix_space=kind.add_prefix_space,
    )
