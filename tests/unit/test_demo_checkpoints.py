"""The demo's cache: what is in it is complete."""

from pathlib import Path

import pytest

from deltazip_deployments.demo.checkpoints import CheckpointCache, default_cache
from deltazip_deployments.demo.recipe import Phase, Recipe


def write(path: Path) -> None:
    (path / "weights").write_text("w")


def test_makes_once(tmp_path: Path) -> None:
    cache = CheckpointCache(tmp_path, "key")
    made = []

    def make(path: Path) -> None:
        made.append(path)
        write(path)

    assert cache.get("base", make) == cache.get("base", make) == cache.path("base")
    assert len(made) == 1
    assert (cache.path("base") / "weights").read_text() == "w"


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_what_breaks_off_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    cache = CheckpointCache(tmp_path, "key")

    def breaks_off(path: Path) -> None:
        write(path)
        raise error

    with pytest.raises(error):
        cache.get("base", breaks_off)
    assert not cache.has("base")
    assert list(cache.folder.iterdir()) == []


def test_the_first_to_finish_wins(tmp_path: Path) -> None:
    cache = CheckpointCache(tmp_path, "key")

    def overtaken(path: Path) -> None:
        cache.get("base", write)
        (path / "weights").write_text("late")

    assert (cache.get("base", overtaken) / "weights").read_text() == "w"
    assert [path.name for path in cache.folder.iterdir()] == ["base"]


def test_key_depends_on_recipe_and_code(tmp_path: Path) -> None:
    source = tmp_path / "code.py"
    source.write_text("a")
    key = Recipe().key([source])
    assert Recipe().key([source]) == key
    assert Recipe(finetune=Phase(steps=7, peak_lr=1e-3)).key([source]) != key
    source.write_text("b")
    assert Recipe().key([source]) != key


def test_default_is_the_users_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache() == tmp_path / "deltazip" / "demo"
