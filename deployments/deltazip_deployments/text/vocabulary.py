"""Vocabularies for structured output."""

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import xgrammar
from transformers import PreTrainedTokenizerFast

from deltazip_deployments.text.foreign import blamed_on_files
from deltazip_deployments.text.version_files import Files, VersionFiles, base_files
from deltazip_deployments.text.version_text import load_version_text
from deltazip_ray.artifact.catalog import Catalog
from deltazip_ray.artifact.store import open_store
from deltazip_ray.config import AppConfig
from deltazip_ray.engine.structure import Vocabulary
from deltazip_ray.errors import InvalidRequest, ManifestInvalid
from deltazip_ray.once import Once

_VOCABULARIES = 16  # about 10 MB each for 128,000 tokens
_THREADS = 2  # more would compete with the engine's steps for the GIL


class Vocabularies:
    """A cache of vocabularies, which take seconds to make: versions with equal files share one.

    Belongs to one event loop; reads and loads run in threads.
    """

    def __init__(self, config: AppConfig, base_digest: Callable[[], str]) -> None:
        self._config = config
        self._base_digest = base_digest
        self._files = Once[None, VersionFiles](1)
        pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="deltazip-vocabulary")
        self._made = Once[Files, Vocabulary](_VOCABULARIES, pool)

    async def get(self, version: str | None) -> Vocabulary:
        """The vocabulary of ``version``; None: the base.

        Raises InvalidRequest if there is no end token, ManifestInvalid, StoreError, ConfigError.
        """
        # Once: making a boto3 client holds the GIL for about 50 ms, which delays steps.
        source = await self._files.get(None, self._open)
        files = await source.of(version)
        return await self._made.get(files, lambda: _make(source.read(files)))

    def _open(self) -> VersionFiles:
        catalog = Catalog(open_store(self._config.store), self._base_digest())
        return VersionFiles(catalog, base_files(Path(self._config.base)))


def _make(files: Mapping[str, bytes]) -> Vocabulary:
    text = load_version_text(files)
    with blamed_on_files(ManifestInvalid, "structured output cannot use the version's tokenizer"):
        return Vocabulary.of(make_vocabulary(text.tokenizer, text.end_token_ids))


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
