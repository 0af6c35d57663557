import pytest
import torch

from deltazip_kernels import CODECS, GROUP, pack, packed_bytes, packed_layout, unpack, unpack_rows
from tests.support.deltas import Coded, random_coded

SHAPES = [(64, 128), (64, 256), (1, 1), (63, 129), (65, 127), (130, 260), (200, 64), (96, 390)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("codec", CODECS)
def test_unpack_returns_what_was_packed(codec: str, shape: tuple[int, int]) -> None:
    coded = random_coded(codec, shape)
    packed = coded.packed()
    assert {k: (tuple(t.shape), t.dtype) for k, t in packed.items()} == packed_layout(codec, shape)
    assert all(t.is_contiguous() for t in packed.values())
    assert sum(t.numel() * t.itemsize for t in packed.values()) == packed_bytes(codec, shape)
    assert torch.equal(unpack(codec, packed, shape).double(), coded.dense())


@pytest.mark.parametrize("codec", CODECS)
def test_unpack_rows_reads_any_rows_in_any_order(codec: str) -> None:
    coded = random_coded(codec, (130, 260))
    rows = torch.tensor([129, 0, 64, 63, 64, 5])
    found = unpack_rows(codec, coded.packed(), (130, 260), rows)
    assert torch.equal(found.double(), coded.dense()[rows])
    assert unpack_rows(codec, coded.packed(), (130, 260), rows[:0]).shape == (0, 260)


@pytest.mark.parametrize("codec", CODECS)
def test_unpack_rows_refuses_rows_outside(codec: str) -> None:
    packed = random_coded(codec, (70, 64)).packed()
    for row in (-1, 70, 127):
        with pytest.raises(ValueError, match=r"rows must be in 0\.\.69"):
            unpack_rows(codec, packed, (70, 64), torch.tensor([0, row]))


@pytest.mark.parametrize("codec", CODECS)
def test_shards_are_slices_of_whole_tiles(codec: str) -> None:
    coded = random_coded(codec, (192, 768))
    packed = coded.packed()
    shard = {}
    for name, tensor in packed.items():
        unit = tensor.shape[1] // 3  # of each tensor, the middle third along K: columns 256..511
        shard[name] = tensor[1:, unit : 2 * unit].contiguous()
    assert torch.equal(unpack(codec, shard, (128, 256)).double(), coded.dense()[64:, 256:512])


def test_int4_tile_bytes_are_as_documented() -> None:
    codes = torch.randint(0, 16, (64, 128), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    byte = int(pack("int4", codes, torch.ones(64, 1))["codes"][0, 0, 7, 33])
    # Byte 33 holds positions 33 and 97; position 32 p + q is column 4 q + p; the top bit of a code is flipped.
    assert (byte & 15) ^ 8 == codes[7, 4 * 1 + 1]
    assert (byte >> 4) ^ 8 == codes[7, 4 * 1 + 3]


def test_int2_byte_holds_four_neighbours() -> None:
    codes = torch.randint(0, 4, (64, 128), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    byte = int(pack("int2", codes, torch.ones(64, 1))["codes"][0, 0, 5, 9])
    assert [((byte >> shift) & 3) ^ 2 for shift in (0, 2, 4, 6)] == codes[5, 36:40].tolist()


def test_a_kept_zero_and_a_kept_lowest_code_survive_sparsity() -> None:
    codes = torch.full((1, 8), 8, dtype=torch.uint8)
    codes[0, :4] = torch.tensor([0, 3, 8, 15])
    kept = torch.tensor([[True, False, True, False, False, False, False, True]])
    packed = pack("sparse24_int4", codes, torch.ones(1, 1), kept)
    assert unpack("sparse24_int4", packed, (1, 8)).tolist() == [[-8, 0, 0, 0, 0, 0, 0, 0]]
    assert int(packed["index"][0, 0, 0, 0]) & 15 == 0b0101


@pytest.mark.parametrize("codec", ["sparse24_int4", "sparse24_int2"])
def test_a_quad_may_keep_fewer_than_two(codec: str) -> None:
    coded = random_coded(codec, (32, 100))
    assert coded.kept is not None
    fewer = Coded(coded.codec, coded.codes, coded.scales, coded.kept & (torch.arange(100) % 3 > 0))
    assert torch.equal(unpack(codec, fewer.packed(), (32, 100)).double(), fewer.dense())


def test_scales_are_rounded_to_bfloat16() -> None:
    packed = pack("int4", torch.full((1, 1), 9, dtype=torch.uint8), torch.tensor([[1.001]]))
    assert unpack("int4", packed, (1, 1)).item() == 1.0


@pytest.mark.parametrize(
    ("codec", "codes", "scales", "kept", "message"),
    [
        ("int5", torch.zeros(4, 4, dtype=torch.uint8), torch.ones(4, 1), None, "unknown codec 'int5'.*int4"),
        ("int4", torch.full((4, 4), 16, dtype=torch.uint8), torch.ones(4, 1), None, "below 16"),
        ("int2", torch.zeros(4, 4), torch.ones(4, 1), None, "uint8 codes below 4"),
        ("int4", torch.zeros(4, GROUP + 1, dtype=torch.uint8), torch.ones(4, 1), None, r"scales must be \[4, 2\]"),
        ("int4", torch.zeros(4, 4, dtype=torch.uint8), torch.full((4, 1), torch.nan), None, "finite"),
        ("int4", torch.zeros(0, 4, dtype=torch.uint8), torch.ones(0, 1), None, "needs rows and columns"),
        ("int4", torch.zeros(4, 4, dtype=torch.uint8), torch.ones(4, 1), torch.ones(4, 4).bool(), "takes no mask"),
        ("sparse24_int4", torch.zeros(4, 4, dtype=torch.uint8), torch.ones(4, 1), None, "needs mask"),
        (
            "sparse24_int4",
            torch.zeros(4, 4, dtype=torch.uint8),
            torch.ones(4, 1),
            torch.ones(4, 4).bool(),
            "at most two",
        ),
    ],
)
def test_pack_refuses(
    codec: str, codes: torch.Tensor, scales: torch.Tensor, kept: torch.Tensor | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        pack(codec, codes, scales, kept)


def test_unpack_refuses_tensors_of_another_shape() -> None:
    packed = random_coded("int4", (64, 128)).packed()
    with pytest.raises(ValueError, match="packed tensors of a int4 matrix"):
        unpack("int4", packed, (65, 128))
