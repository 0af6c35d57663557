import hashlib
import json
from typing import Any

import pytest
from pydantic import ValidationError

from deltazip_ray.artifact.manifest import BaseRef, BlobEntry, FileEntry, Manifest, Quality, TensorEntry, parse_manifest
from deltazip_ray.errors import ManifestInvalid

D = "ab" * 32


def make_manifest(**changes: Any) -> Manifest:
    tensors = {
        "model.layers.0.mlp.up_proj.weight": TensorEntry(codec="int4", shape=(64, 128), bytes_finetuned=16384),
        "model.layers.0.input_layernorm.weight": TensorEntry(codec="raw", shape=(128,), bytes_finetuned=256),
    }
    fields = {
        "layout_version": 1,
        "base": BaseRef(digest=D, architecture="LlamaForCausalLM", vocab_size=100),
        "bytes_finetuned": 16640,
        "blobs": (BlobEntry(block="layers.0", digest=D, size=5000, tensors=tensors),),
        "files": {"tokenizer.json": FileEntry(digest=D, size=7)},
        "quality": Quality(data="wikitext", block_errors={"layers.0": 0.01}),
    }
    return Manifest(**(fields | changes))


def document(**changes: Any) -> bytes:
    data = json.loads(make_manifest().canonical())
    for path, value in changes.items():
        *steps, last = path.split("__")
        part = data
        for step in steps:
            part = part[int(step) if step.isdecimal() else step]
        part[last] = value
    return json.dumps(data).encode()


def test_round_trip_keeps_the_version() -> None:
    manifest = make_manifest()
    raw = manifest.canonical()
    assert parse_manifest(raw, manifest.version()) == manifest
    assert parse_manifest(raw).canonical() == raw
    assert manifest.version() == hashlib.sha256(raw).hexdigest()


def test_the_version_does_not_follow_spelling() -> None:
    pretty = json.dumps(json.loads(make_manifest().canonical()), indent=2).encode()
    assert parse_manifest(pretty).version() == make_manifest().version()


def test_defaults_do_not_count_so_that_later_fields_keep_versions() -> None:
    assert "added_tokens" not in json.loads(make_manifest().canonical())
    assert json.loads(make_manifest(added_tokens=1).canonical())["added_tokens"] == 1
    assert json.loads(make_manifest().canonical())["format_version"] == 1


def test_sizes() -> None:
    manifest = make_manifest()
    assert manifest.bytes_artifact == 5000
    assert manifest.bytes_stored == 5007
    assert [entry.size for entry in manifest.stored] == [5000, 7]


def test_another_digest_is_refused() -> None:
    with pytest.raises(ManifestInvalid, match="is damaged"):
        parse_manifest(make_manifest().canonical() + b" ", make_manifest().version())


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"\xff\xfe",
        b"{",
        b"[]",
        b"null",
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b"{}",
        b'"' + b"x" * 1000,
        b"\x80\x04K\x01.",
    ],
)
def test_what_is_no_manifest(raw: bytes) -> None:
    with pytest.raises(ManifestInvalid):
        parse_manifest(raw)


UP = "model.layers.0.mlp.up_proj.weight"
ENTRY = {"codec": "raw", "shape": [1], "bytes_finetuned": 1}


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("format_version", 2),
        ("layout_version", 0),
        ("surprise", 1),
        ("base__digest", "../" + "0" * 61),
        ("base__vocab_size", 0),
        ("blobs__0__digest", D.upper()),
        ("blobs__0__size", 0),
        ("blobs__0__size", 1 << 70),
        ("blobs__0__block", "../layers.0"),
        ("blobs__0__block", "layers.00"),
        ("blobs__0__block", "layers.1"),
        ("blobs__0__block", "outer"),
        ("blobs__0__tensors", {}),
        ("blobs__0__tensors", {"../../x": ENTRY}),
        ("blobs__0__tensors", {"model.embed_tokens.weight": ENTRY}),
        ("blobs__0__tensors", {UP: ENTRY | {"codec": "pickle"}}),
        ("blobs__0__tensors", {UP: ENTRY | {"codec": "int4"}}),
        ("blobs__0__tensors", {UP: ENTRY | {"shape": [0]}}),
        ("blobs__0__tensors", {UP: ENTRY | {"shape": [-1]}}),
        ("blobs__0__tensors", {UP: ENTRY | {"shape": [1 << 40]}}),
        ("blobs__0__tensors", {UP: ENTRY | {"shape": [1] * 9}}),
        ("blobs__0__tensors", {UP: ENTRY | {"relative_error": -1}}),
        ("blobs__0__tensors", {UP: ENTRY | {"codec": "int4", "shape": [1, 1]}, f"{UP}.codes": ENTRY}),
        ("files", {"../x": {"digest": D, "size": 1}}),
        ("files", {"a/b": {"digest": D, "size": 1}}),
        ("files", {".hidden": {"digest": D, "size": 1}}),
        ("files", {"ok.json": {"digest": D, "size": 1 << 40}}),
        ("quality__kl_divergence", "NaN"),
    ],
)
def test_hostile_fields(path: str, value: Any) -> None:
    parse_manifest(document())
    with pytest.raises(ManifestInvalid) as caught:
        parse_manifest(document(**{path: value}))
    assert len(caught.value.message) < 600


def test_numbers_that_json_does_not_know() -> None:
    for number in (b"NaN", b"Infinity", b"-Infinity"):
        with pytest.raises(ManifestInvalid):
            parse_manifest(document().replace(b"0.01", number))


def test_a_block_twice_is_refused() -> None:
    blob = make_manifest().blobs[0]
    with pytest.raises(ValidationError, match="named twice"):
        make_manifest(blobs=(blob, blob))


@pytest.mark.parametrize(("codec", "rank"), [("low_rank", None), ("int4", 4), ("raw", 4), ("low_rank", 129)])
def test_a_rank_belongs_to_low_rank_alone(codec: str, rank: int | None) -> None:
    with pytest.raises(ValidationError):
        TensorEntry.model_validate({"codec": codec, "shape": (64, 128), "bytes_finetuned": 1, "rank": rank})
    assert TensorEntry(codec="low_rank", shape=(64, 128), bytes_finetuned=1, rank=4).rank == 4
