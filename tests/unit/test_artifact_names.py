import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltazip_ray.artifact.manifest import blob_key
from deltazip_ray.artifact.names import check_alias, check_digest, check_name, is_name, is_version, parse_ref
from deltazip_ray.artifact.object_store import check_key
from deltazip_ray.errors import InvalidName

SAFE = re.compile(r"[A-Za-z0-9._-]+")


@pytest.mark.parametrize("name", ["a", "7", "sorter", "llama-3.1-8b_chat", "a" * 64, "A.b-C_d"])
def test_names(name: str) -> None:
    assert check_name(name) == name


@pytest.mark.parametrize(
    "name",
    [
        *(
            "",
            ".",
            "..",
            "../x",
            "a/b",
            "a\\b",
            "a..b",
            "-a",
            "a-",
            ".a",
            "a.",
            "a" * 65,
            "a b",
            "a\n",
            "a\0",
            "a\r\nb",
        ),
        *("https://evil.example/x", "file:///etc/passwd", "ä", "аdmin", "a%2fb", "$(x)", "{a}", "a@b", "a:b", "~root"),
    ],
)
def test_hostile_names(name: str) -> None:
    with pytest.raises(InvalidName) as caught:
        check_name(name)
    assert len(caught.value.message) < 400


@given(st.text(max_size=80))
def test_whatever_passes_is_one_harmless_path_segment(name: str) -> None:
    if not is_name(name):
        with pytest.raises(InvalidName):
            check_name(name)
        return
    assert SAFE.fullmatch(name)
    assert ".." not in name
    assert not name.startswith(".")
    assert check_key(f"variants/{name}/x") == f"variants/{name}/x"


@given(st.text(max_size=150))
def test_a_reference_splits_into_harmless_parts(model: str) -> None:
    try:
        ref = parse_ref(model)
    except InvalidName:
        return
    assert is_name(ref.name)
    assert is_name(ref.selector)
    assert model in (ref.name, f"{ref.name}@{ref.selector}")


def test_references() -> None:
    assert parse_ref("sorter") == ("sorter", "latest")
    assert parse_ref("sorter@prod") == ("sorter", "prod")
    assert parse_ref("sorter@" + "0f" * 6) == ("sorter", "0f" * 6)
    for model in ("sorter@", "@prod", "a@b@c", "a@../b"):
        with pytest.raises(InvalidName):
            parse_ref(model)


def test_an_alias_never_looks_like_a_version() -> None:
    assert check_alias("prod") == "prod"
    assert is_version("0123456789ab")
    with pytest.raises(InvalidName, match="looks like"):
        check_alias("0123456789ab")


@pytest.mark.parametrize("digest", ["", "0" * 63, "0" * 65, "A" * 64, "g" * 64, "../" + "0" * 61, "0" * 64 + "\n"])
def test_hostile_digests(digest: str) -> None:
    with pytest.raises(InvalidName):
        check_digest(digest)
    with pytest.raises(InvalidName):
        blob_key(digest)
