import gc
import hashlib
import json
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load

from deltazip_kernels.layout import CODECS, GROUP, pack
from deltazip_ray.artifact.blob import ALIGNMENT, read_blob, write_blob
from deltazip_ray.artifact.digests import verify_blob
from deltazip_ray.artifact.manifest import BlobEntry, TensorEntry
from deltazip_ray.errors import BlobCorrupt

UP, NORM = "model.layers.0.mlp.up_proj.weight", "model.layers.0.input_layernorm.weight"


def make_tensors(codec: str = "sparse24_int4", shape: tuple[int, int] = (70, 200)) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    codes = torch.randint(0, 1 << CODECS[codec].bits, shape, dtype=torch.uint8, generator=generator)
    scales = torch.rand(shape[0], -(-shape[1] // GROUP), generator=generator)
    kept = torch.arange(shape[1]).remainder(2).eq(0).expand(shape).contiguous() if CODECS[codec].sparse else None
    packed = pack(codec, codes, scales, kept)
    norm = torch.randn(shape[1], generator=generator).to(torch.float16)
    return {f"{UP}.{part}": tensor for part, tensor in packed.items()} | {NORM: norm}


def make_entry(data: bytes, codec: str = "sparse24_int4", shape: tuple[int, int] = (70, 200)) -> BlobEntry:
    tensors = {
        UP: TensorEntry(codec=codec, shape=shape, bytes_finetuned=1),
        NORM: TensorEntry(codec="raw", shape=(shape[1],), bytes_finetuned=1),
    }
    return BlobEntry(block="layers.0", digest=hashlib.sha256(data).hexdigest(), size=len(data), tensors=tensors)


def rewrite_header(data: bytes, change: Any) -> bytes:
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    text = json.dumps(change(header) or header).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


TENSORS = make_tensors()
BLOB = write_blob(TENSORS)
ENTRY = make_entry(BLOB)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("shape", [(1, 1), (64, 128), (65, 129), (130, 300)])
def test_round_trip(codec: str, shape: tuple[int, int]) -> None:
    tensors = make_tensors(codec, shape)
    data = write_blob(tensors)
    entry = make_entry(data, codec, shape)
    verify_blob(data, entry)
    found = read_blob(data, entry)
    assert found.keys() == tensors.keys()
    assert all(found[name].dtype == tensors[name].dtype and torch.equal(found[name], tensors[name]) for name in tensors)


def test_equal_tensors_give_equal_bytes_in_any_order() -> None:
    assert write_blob(dict(reversed(TENSORS.items()))) == BLOB


def test_bytes_of_the_format_are_pinned() -> None:
    """Blobs are named by their digests: this may change only with the format's version."""
    data = write_blob({"b": torch.arange(6, dtype=torch.uint8).view(2, 3), "a": torch.tensor([1.0, -2.0])})
    assert hashlib.sha256(data).hexdigest() == "7c377c08e96afc5655abb36b5fa3b88cdedb99ef2ce46323a538a0ac8d3a4635"


def test_safetensors_reads_it() -> None:
    found = load(BLOB)
    assert all(torch.equal(found[name], TENSORS[name]) for name in TENSORS)
    assert len(found) == len(TENSORS)


def test_non_contiguous_tensors_are_written_as_they_look() -> None:
    weight = torch.arange(12.0).view(3, 4).T
    data = write_blob({NORM: weight})
    assert torch.equal(load(data)[NORM], weight)


def test_data_is_aligned() -> None:
    start = 8 + int.from_bytes(BLOB[:8], "little")
    assert start % ALIGNMENT == 0
    for piece in json.loads(BLOB[8:start]).values():
        assert piece["data_offsets"][0] % {"F16": 2, "BF16": 2, "U8": 1}[piece["dtype"]] == 0


def test_reading_copies_nothing() -> None:
    arena = bytearray(100 + len(BLOB))
    view = memoryview(arena)[64 : 64 + len(BLOB)]
    view[:] = BLOB
    found = read_blob(view, ENTRY)
    address = np.frombuffer(arena, np.uint8).ctypes.data
    assert all(address <= tensor.data_ptr() < address + len(arena) for tensor in found.values())


def test_views_keep_their_buffer_alive() -> None:
    found = read_blob(memoryview(bytes(bytearray(BLOB))), ENTRY)
    gc.collect()
    filler = [bytes([i % 256]) * len(BLOB) for i in range(50)]
    assert all(torch.equal(found[name], TENSORS[name]) for name in TENSORS)
    del filler


def test_sizes_and_digests_are_verified() -> None:
    flipped = bytearray(BLOB)
    flipped[-1] ^= 1
    for bad in (flipped, BLOB[:-1], BLOB + b"\0", b""):
        with pytest.raises(BlobCorrupt, match="publish the version again"):
            verify_blob(bad, ENTRY)
    with pytest.raises(BlobCorrupt):
        read_blob(BLOB[:-1], ENTRY)


@settings(max_examples=300, deadline=None)
@given(st.integers(0, len(BLOB) - 1))
def test_truncation_is_refused(size: int) -> None:
    data = BLOB[:size]
    with pytest.raises(BlobCorrupt):
        verify_blob(data, ENTRY)
    with pytest.raises(BlobCorrupt):
        read_blob(data, ENTRY.model_copy(update={"size": size}))


@settings(max_examples=500, deadline=None)
@given(st.lists(st.tuples(st.integers(0, len(BLOB) * 8 - 1)), min_size=1, max_size=5, unique=True))
def test_flipped_bits_are_refused(flips: list[tuple[int]]) -> None:
    data = bytearray(BLOB)
    for (bit,) in flips:
        data[bit // 8] ^= 1 << bit % 8
    with pytest.raises(BlobCorrupt):
        verify_blob(data, ENTRY)


@settings(max_examples=800, deadline=None)
@given(st.integers(0, 8 * 400), st.integers(0, 255))
def test_a_damaged_header_never_crashes(position: int, value: int) -> None:
    data = bytearray(BLOB)
    data[position % (8 + int.from_bytes(BLOB[:8], "little"))] = value
    try:
        found = read_blob(data, ENTRY)
    except BlobCorrupt:
        return
    assert {name: tensor.shape for name, tensor in found.items()} == {name: t.shape for name, t in TENSORS.items()}


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=300))
def test_random_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(BlobCorrupt):
        read_blob(data, ENTRY.model_copy(update={"size": len(data)}))


def overlap(header: dict[str, Any]) -> None:
    first, second, *_ = sorted(header, key=lambda name: header[name]["data_offsets"])
    begin, end = header[second]["data_offsets"]
    size = header[first]["data_offsets"][1]
    header[second]["data_offsets"] = [begin - size, end - size]


CODES = f"{UP}.codes"
CHANGES = {
    "overlap": overlap,
    "beyond the end": lambda h: h[CODES].update(data_offsets=[0, 1 << 60]),
    "negative": lambda h: h[CODES].update(data_offsets=[-8, 8]),
    "backwards": lambda h: h[CODES].update(data_offsets=h[CODES]["data_offsets"][::-1]),
    "huge shape": lambda h: h[CODES].update(shape=[1 << 62, 1 << 62]),
    "huge rank": lambda h: h[CODES].update(shape=[1] * 10_000),
    "huge number": lambda h: h[CODES].update(shape=[10**4000]),
    "zero": lambda h: h[CODES].update(shape=[0]),
    "another shape of equal size": lambda h: h[CODES].update(shape=h[CODES]["shape"][::-1]),
    "dtype confusion": lambda h: h[CODES].update(dtype="I8"),
    "scales as float16": lambda h: h[f"{UP}.scales"].update(dtype="F16"),
    "raw as integers": lambda h: h[NORM].update(dtype="I16"),
    "unknown dtype": lambda h: h[CODES].update(dtype="OBJECT"),
    "dtype no string": lambda h: h[CODES].update(dtype=3),
    "float offsets": lambda h: h[CODES].update(data_offsets=[0.0, 64.0]),
    "surplus key": lambda h: h[CODES].update(pickle="x"),
    "missing tensor": lambda h: h.pop(NORM) and None,
    "surplus tensor": lambda h: h.update({"../../etc/passwd": h[NORM]}),
    "renamed tensor": lambda h: h.update({"x": h.pop(NORM)}),
    "metadata": lambda h: h.update({"__metadata__": {"a": "b"}}),
    "no object": lambda h: [h],
}


@pytest.mark.parametrize("change", CHANGES)
def test_hostile_headers(change: str) -> None:
    data = rewrite_header(BLOB, CHANGES[change])
    with pytest.raises(BlobCorrupt):
        read_blob(data, make_entry(data))


@pytest.mark.parametrize("length", [0, 1, len(BLOB), len(BLOB) - 7, 1 << 32, (1 << 64) - 1])
def test_hostile_header_lengths(length: int) -> None:
    data = length.to_bytes(8, "little") + BLOB[8:]
    with pytest.raises(BlobCorrupt):
        read_blob(data, make_entry(data))


def test_deeply_nested_headers() -> None:
    text = b'{"a":' * 200_000
    data = len(text).to_bytes(8, "little") + text
    with pytest.raises(BlobCorrupt):
        read_blob(data, make_entry(data))


def test_unaligned_data_is_refused() -> None:
    length = int.from_bytes(BLOB[:8], "little")
    data = (length + 1).to_bytes(8, "little") + BLOB[8 : 8 + length] + b" " + BLOB[8 + length :]
    with pytest.raises(BlobCorrupt, match="aligned"):
        read_blob(data, make_entry(data))


def test_a_product_is_two_matrices_of_its_rank() -> None:
    generator = torch.Generator().manual_seed(1)
    tensors = {
        f"{UP}.down": torch.randn(3, 200, generator=generator).bfloat16(),
        f"{UP}.up": torch.randn(70, 3, generator=generator).bfloat16(),
    }
    data = write_blob(tensors)

    def entry(rank: int) -> BlobEntry:
        weight = TensorEntry(codec="low_rank", shape=(70, 200), bytes_finetuned=1, rank=rank)
        return BlobEntry(block="layers.0", digest="a" * 64, size=len(data), tensors={UP: weight})

    found = read_blob(data, entry(3))
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    with pytest.raises(BlobCorrupt, match=r"its manifest says torch\.bfloat16 \[4, 200\]|\[70, 4\]"):
        read_blob(data, entry(4))
