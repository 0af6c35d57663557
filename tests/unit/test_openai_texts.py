"""Tokenizers of versions: loaded once for equal files, wherever these are."""

import asyncio
import threading
from pathlib import Path

import pytest

from deltazip_deployments.text.texts import Texts
from deltazip_deployments.text.version_files import VersionFiles, base_files
from deltazip_deployments.text.vocabulary import Vocabularies
from deltazip_ray.artifact.catalog import Catalog
from deltazip_ray.artifact.store import open_store
from deltazip_ray.config import AppConfig, StoreConfig
from tests.support.catalogs import BASE_DIGEST, publish, save_base_files


async def test_versions_with_equal_files_share_a_tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = StoreConfig(url=(tmp_path / "store").as_uri())
    plain = [publish(config, tmp_path, name, seed=i) for i, name in enumerate(("one", "two"))]
    own = publish(config, tmp_path, "three", template="{{ messages[0].content }}!")
    catalog = Catalog(open_store(config), BASE_DIGEST)
    fetched: list[str] = []
    fetch = catalog.file

    def counted(digest: str) -> bytes:
        fetched.append(digest)
        return fetch(digest)

    monkeypatch.setattr(catalog, "file", counted)
    texts = Texts(VersionFiles(catalog, base_files(save_base_files(tmp_path / "base"))))

    base = await texts.get(None)
    assert [await texts.get(version) for version in plain] == [base, base]
    assert not fetched
    other = await texts.get(own)
    assert other is not base
    assert len(fetched) == 1, "only its template is its own"
    said = [{"role": "user", "content": "ab"}]
    assert other.encode_chat(said, 64) == other.tokenizer.backend_tokenizer.encode("ab!", add_special_tokens=False).ids
    assert base.encode_chat(said, 64) != other.encode_chat(said, 64)

    long_one = threading.Event()
    waiting = asyncio.create_task(texts.thread(plain[0]).run(long_one.wait))
    assert await texts.thread(plain[1]).run(lambda: 2) == 2, "they share the tokenizer, and yet do not wait"
    assert texts.thread(plain[0]) is texts.thread(plain[0])
    long_one.set()
    await waiting


async def test_versions_with_equal_files_share_a_vocabulary(tmp_path: Path) -> None:
    store = StoreConfig(url=(tmp_path / "store").as_uri())
    plain = [publish(store, tmp_path, name, seed=i) for i, name in enumerate(("one", "two"))]
    own = publish(store, tmp_path, "three", template="{{ messages[0].content }}!")
    config = AppConfig(base=str(save_base_files(tmp_path / "base")), store=store)
    vocabularies = Vocabularies(config, lambda: BASE_DIGEST)
    base = await vocabularies.get(None)
    assert [await vocabularies.get(version) for version in plain] == [base, base]
    assert await vocabularies.get(own) is not base
