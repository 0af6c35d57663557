"""The Triton backend against float64. Its only approximation is the rounding of activations to int8, which the first
test bounds; the others compare with the product of the rounded activations, to the rounding of the output."""

from itertools import accumulate

import pytest
import torch
from torch import Tensor

from deltazip_kernels import CODECS, LOW_RANK, RAW, PackedDelta, Segments, delta_matmul, quantize, triton_backend
from deltazip_kernels.device import dense, grouped
from deltazip_kernels.layout import from_positions
from deltazip_kernels.plan import MANY, MORE, SOME, Work, in_halves, plan
from deltazip_kernels.quantize import quantize_rows
from deltazip_kernels.table import CODEC_IDS, DeltaTable
from deltazip_kernels.triton_backend import Tile, grouped_matmul, low_rank_matmul, raw_matmul
from tests.support.deltas import on_device, random_coded, random_low_rank, random_raw

NAMES = [None, *CODECS, RAW, LOW_RANK]
PACKED = {name: i for i, name in enumerate(NAMES) if name in CODECS}
SHAPES = [(100, 256), (193, 388)]
MIXTURES = {
    "distinct": ([1] * 9, [8, 7, 6, 5, 4, 3, 2, 1, 0]),
    "uniform": ([10] * 4, [1, 3, 5, 7]),
    "zipf": ([19, 9, 5, 3, 1, 1], [3, 2, 5, 7, 8, 1]),
    "one giant": ([1, 70, 2], [1, 3, 2]),
    "identical": ([3, 12, 3], [5, 5, 5]),
    "empty and base between": ([0, 3, 2, 0, 17, 1, 1], [1, -1, 2, -1, 0, 6, 4]),
}


def make_deltas(
    shape: tuple[int, int], device: torch.device, dtype: torch.dtype
) -> tuple[list[PackedDelta | None], list[Tensor]]:
    """A slot for each of NAMES and its dense matrix in float64."""
    deltas: list[PackedDelta | None] = []
    dense = []
    for seed, name in enumerate(NAMES):
        if name is None:
            deltas.append(None)
            dense.append(torch.zeros(shape, dtype=torch.float64))
        elif name in CODECS:
            coded = random_coded(name, shape, seed)
            deltas.append(on_device(coded.delta(), device))
            dense.append(coded.dense())
        else:
            delta = random_raw(shape, seed, dtype) if name == RAW else random_low_rank(shape, 12, seed, dtype)
            deltas.append(on_device(delta, device))
            parts = {key: value.double() for key, value in delta.tensors.items()}
            dense.append(parts["values"] if name == RAW else parts["up"] @ parts["down"])
    return deltas, [d.to(device) for d in dense]


def table(lengths: list[int], slots: list[int], device: torch.device) -> Segments:
    starts = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
    return Segments(starts.to(device), torch.tensor(slots, dtype=torch.int32).to(device))


def planned(segments: Segments, rows: int, longest: int | None = None, *, halves: bool = False) -> Work:
    work = plan(segments, rows, longest, halves=halves)
    assert work is not None
    return work


def rounded(x: Tensor) -> Tensor:
    """The activations that packed codecs see, float64."""
    q = quantize_rows(x)
    return from_positions(q.values.double())[:, : x.shape[1]] * q.scales.double()[:, None]


def size_of_terms(x: Tensor, delta: PackedDelta | None) -> Tensor:
    """What the rounding of a low-rank delta's inner vector is relative to."""
    assert delta is not None
    return (x.double() @ delta.tensors["down"].double().T).abs() @ delta.tensors["up"].double().abs().T


@pytest.mark.parametrize("columns", [1, 127, 388, 2500])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_rounding_of_activations_is_bounded(columns: int, dtype: torch.dtype, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(columns)
    x = (torch.randn(5, columns, generator=generator) * torch.tensor([1e-3, 1.0, 300.0, 0.0, 1.0])[:, None]).to(dtype)
    x[4, 0] = 1000.0  # an outlier
    wide = torch.cat([x, torch.full((5, 3), 9e4, dtype=torch.float32).to(dtype)], dim=1).to(device)
    x, seen = x.to(device).double(), rounded(wide[:, :columns])
    bound = x.abs().amax(dim=1, keepdim=True) / 254 * (1 + 1e-5)
    assert bool(((seen - x).abs() <= bound).all())
    assert bool((seen[3] == 0).all())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("mixture", MIXTURES)
def test_equals_float64(shape: tuple[int, int], mixture: str, device: torch.device) -> None:
    dtype = torch.bfloat16 if shape[0] % 2 else torch.float16
    lengths, slots = MIXTURES[mixture]
    deltas, dense = make_deltas(shape, device, dtype)
    rows = sum(lengths) + 3  # the last rows belong to no segment
    generator = torch.Generator().manual_seed(11)
    x = torch.randn(rows, shape[1], generator=generator).to(device, dtype)
    wide = torch.randn(rows, shape[0] + 8, generator=generator).to(device, dtype)
    before = wide.clone()
    y = wide[:, 8:]
    delta_matmul(y, x, deltas, table(lengths, slots, device), backend="triton")

    want, inner = before.double(), torch.zeros_like(before, dtype=torch.float64)
    touched = torch.zeros(rows, dtype=torch.bool, device=device)
    for slot, first, length in zip(slots, [0, *accumulate(lengths)], lengths, strict=False):
        if slot >= 0 and deltas[slot] is not None:
            part = slice(first, first + length)
            activations = rounded(x) if slot in PACKED.values() else x.double()
            want[part, 8:] += activations[part] @ dense[slot].T
            touched[part] = True
            if NAMES[slot] == LOW_RANK:
                inner[part, 8:] = size_of_terms(x[part], deltas[slot])
    assert torch.equal(wide[~touched], before[~touched])
    assert torch.equal(wide[:, :8], before[:, :8])
    # One rounding of the sum to the output's type (Triton's interpreter cuts bfloat16 off instead of rounding it); a
    # low-rank delta rounds the vector between its factors too. 1e-5 is for the sums in float32.
    epsilon = torch.finfo(dtype).eps * (2 if device.type == "cpu" and dtype == torch.bfloat16 else 1)
    assert bool(((wide.double() - want).abs() <= epsilon * (0.51 * want.abs() + 0.5 * inner) + 1e-5).all())


@pytest.mark.parametrize("codec", CODECS)
def test_stacked_linears_and_odd_groups(codec: str, device: torch.device) -> None:
    """q|k|v in one launch, into float32: the sums themselves are exact to float32."""
    shapes = [(130, 388), (64, 388), (70, 388)]
    coded = [[random_coded(codec, shape, seed=10 * slot + i) for i, shape in enumerate(shapes)] for slot in range(2)]
    deltas = DeltaTable(shapes, 3, device)
    deltas.set(1, [on_device(c.delta(), device) for c in coded[0]])
    first, _, third = (on_device(c.delta(), device) for c in coded[1])
    deltas.set(2, [first, None, third])
    segments = table([2, 5, 20], [0, 1, 2], device)
    x = torch.randn(27, 388, generator=torch.Generator().manual_seed(5)).to(device)
    y = torch.zeros(27, sum(n for n, _ in shapes), device=device)
    grouped_matmul(y, quantize_rows(x), deltas, planned(segments, 27), [codec])
    for slot, rows in ((0, slice(2, 7)), (1, slice(7, 27))):
        dense = [c.dense().to(device) for c in coded[slot]]
        if slot == 1:
            dense[1] = torch.zeros_like(dense[1])
        want = rounded(x)[rows] @ torch.cat(dense).T
        assert float((y[rows].double() - want).abs().max()) <= 1e-6 * float(want.abs().max())
    assert bool((y[:2] == 0).all()), "an empty slot adds nothing"


@pytest.mark.parametrize(("dtype", "ranks"), [(torch.float32, (9, 33)), (torch.bfloat16, (16, 8))])
def test_stacked_raw_and_low_rank(dtype: torch.dtype, ranks: tuple[int, int], device: torch.device) -> None:
    shapes = [(100, 1300), (40, 1300)]
    deltas = DeltaTable(shapes, 2, device, dtype)
    raws = [on_device(random_raw(shape, i, dtype), device) for i, shape in enumerate(shapes)]
    pairs = [
        on_device(random_low_rank(shape, rank, 7, dtype), device) for shape, rank in zip(shapes, ranks, strict=True)
    ]
    deltas.set(0, [raws[0], pairs[1]])
    deltas.set(1, [pairs[0], raws[1]])
    x = torch.randn(30, 1300, generator=torch.Generator().manual_seed(5)).to(device, dtype)
    y = torch.zeros(30, 140, device=device)
    work = planned(table([3, 27], [1, 0], device), 30)
    raw_matmul(y, x, deltas, work)
    low_rank_matmul(y, x, deltas, work, max(ranks))

    def dense(delta: PackedDelta) -> Tensor:
        parts = {key: value.double() for key, value in delta.tensors.items()}
        return parts["values"] if delta.codec == RAW else parts["up"] @ parts["down"]

    want = torch.cat(
        [
            x[:3].double() @ torch.cat([dense(pairs[0]), dense(raws[1])]).T,
            x[3:].double() @ torch.cat([dense(raws[0]), dense(pairs[1])]).T,
        ]
    )
    tolerance = 4e-6 if dtype == torch.float32 else 2**-8  # bfloat16 rounds the vector between the factors
    assert float((y.double() - want).abs().max()) <= tolerance * float(want.abs().max())


def test_low_rank_segments_of_more_rows_than_most(device: torch.device) -> None:
    """Twelve rows where programs take eight at once, which single rows pay least for."""
    pair = on_device(random_low_rank((70, 300), 16, 7, torch.float32), device)
    deltas = DeltaTable([(70, 300)], 1, device, torch.float32)
    deltas.set(0, [pair])
    x = torch.randn(18, 300, generator=torch.Generator().manual_seed(5)).to(device)
    y = torch.zeros(18, 70, device=device)
    work = planned(table([1, 12, 1, 1, 1, 1, 1], [0, 0, -1, 0, 0, 0, 0], device), 18, 16)
    assert work.sparse
    low_rank_matmul(y, x, deltas, work, 16)
    want = x.double() @ pair.tensors["down"].double().T @ pair.tensors["up"].double().T
    want[13] = 0
    assert float((y.double() - want).abs().max()) <= 4e-6 * float(want.abs().max())


@pytest.mark.parametrize(("splits", "columns"), [(2, 900), (4, 388), (3, 1152)])
@pytest.mark.parametrize("codec", ["int2", "sparse24_int2"])
def test_programs_share_a_tile_along_k(codec: str, splits: int, columns: int, device: torch.device) -> None:
    """Odd numbers of groups, shares without any, wide items ahead of narrow ones; the counters are left as found."""
    coded = random_coded(codec, (100, columns), seed=3)
    deltas = DeltaTable([(100, columns)], 1, device)
    deltas.set(0, [on_device(coded.delta(), device)])
    x = torch.randn(48, columns, generator=torch.Generator().manual_seed(5)).to(device)
    y, again = torch.zeros(2, 48, 100, device=device)
    rows_of_x = quantize_rows(x)
    work = planned(table([40, 3, 5], [0, 0, 0], device), 48)
    work.partials.fill_(torch.nan)
    for out in (y, again):
        grouped_matmul(out, rows_of_x, deltas, work, [codec], Tile(64, 4, 3, splits))
        assert not bool(work.arrived.any())
    sums = 2 * splits * 64 * (64 + 8 + 8)  # each program's have room of their own
    assert int((~work.partials.isnan()).sum()) == sums
    want = rounded(x) @ coded.dense().to(device).T
    assert float((y.double() - want).abs().max()) <= 1e-6 * float(want.abs().max())
    assert torch.equal(y, again)


@pytest.mark.parametrize("tile", [Tile(64, 4, 3, 8), Tile(64, 4, 3, 2)])
def test_no_more_programs_share_tiles_than_there_is_room_for(tile: Tile, device: torch.device) -> None:
    deltas = DeltaTable([(64 * 60, 128)], 1, device)
    work = planned(table([1] * 5, [0] * 5, device), 5)
    y, rows = torch.zeros(5, 64 * 60, device=device), quantize_rows(torch.zeros(5, 128, device=device))
    with pytest.raises(ValueError, match="300 tiles are too many to be shared"):
        grouped_matmul(y, rows, deltas, work, ["int2"], tile)


def test_kernels_and_table_name_codecs_alike() -> None:
    ids = {"int4": grouped.INT4, "int3": grouped.INT3, "int2": grouped.INT2, "int1": grouped.INT1}
    ids |= {
        "sparse24_int4": grouped.SPARSE4,
        "sparse24_int2": grouped.SPARSE2,
        RAW: dense.RAW,
        LOW_RANK: dense.LOW_RANK,
    }
    assert {name: constant.value for name, constant in ids.items()} == CODEC_IDS
    for name, codec in CODECS.items():
        assert grouped.unit(CODEC_IDS[name]) == codec.unit


def test_a_codec_that_is_not_named_is_left_out(device: torch.device) -> None:
    deltas = DeltaTable([(64, 128)], 2, device)
    deltas.set(0, [on_device(random_coded("int2", (64, 128)).delta(), device)])
    deltas.set(1, [on_device(random_raw((64, 128)), device)])
    y = torch.full((5, 64), -0.0, device=device)
    work = planned(table([2, 3], [0, 1], device), 5, 8)
    grouped_matmul(y, quantize_rows(torch.randn(5, 128, device=device)), deltas, work, ["int4"])
    assert bool(torch.signbit(y).all()), "not even the sign of a zero changes"


def test_outputs_must_have_adjacent_columns(device: torch.device) -> None:
    delta = on_device(random_coded("int4", (64, 128)).delta(), device)
    x, y = torch.zeros(3, 128, device=device), torch.zeros(64, 3, device=device).T
    with pytest.raises(ValueError, match="adjacent columns"):
        delta_matmul(y, x, [delta], table([3], [0], device), backend="triton")


def owners(work: Work, rows: int) -> list[int]:
    """The slot that takes each row, -1 for none; no row is taken twice."""
    covered = [-1] * rows
    for slot, first, end, _ in work.items.tolist():
        if slot >= 0:
            assert 0 < end - first <= work.batch
            assert covered[first:end] == [-1] * (end - first)
            covered[first:end] = [slot] * (end - first)
    return covered


@pytest.mark.parametrize("longest", [None, 8, 16, 32])
def test_plan_covers_every_row_of_a_slot_once(longest: int | None, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(2)
    for _ in range(3):
        lengths = torch.randint(0, (longest or 150) + 1, (7,), generator=generator).tolist()
        slots = torch.randint(-1, 4, (7,), generator=generator).tolist()
        rows = sum(lengths) + 4
        want = [slot for slot, length in zip(slots, lengths, strict=True) for _ in range(length)] + [-1] * 4
        assert owners(planned(table(lengths, slots, device), rows, longest), rows) == want


@pytest.mark.parametrize("longest", [32, 40])
def test_plan_cuts_the_one_long_segment_among_short_ones(longest: int, device: torch.device) -> None:
    work = planned(table([1] * 15 + [25], [*range(16)], device), 40, longest)
    assert work.batch == SOME, "single rows do not pay for programs of many"
    assert owners(work, 40) == [*range(15), *[15] * 25]


def test_plan_of_long_segments(device: torch.device) -> None:
    work = planned(table([3, 33, 70], [-1, 2, 1], device), 106, longest=70)
    assert work.batch == MANY
    assert owners(work, 106) == [-1] * 3 + [2] * 33 + [1] * 70


@pytest.mark.parametrize("lengths", [[33, 31, 32, 30], [64, 1, 63, 3], [20, 17, 33, 19, 0, 18]])
def test_a_plan_cuts_up_to_half_of_the_segments_in_two(lengths: list[int], device: torch.device) -> None:
    rows, slots = sum(lengths), [*range(len(lengths))]
    assert in_halves(lengths)
    work = planned(table(lengths, slots, device), rows, longest=max(lengths), halves=True)
    assert work.batch == MORE
    assert owners(work, rows) == [slot for slot, length in zip(slots, lengths, strict=True) for _ in range(length)]


@pytest.mark.parametrize("lengths", [[], [32, 16], [65, 1, 1, 1], [40, 1, 40]])
def test_other_plans_are_not_in_halves(lengths: list[int]) -> None:
    assert not in_halves(lengths)


def test_plan_of_nothing_is_empty(device: torch.device) -> None:
    assert plan(table([], [], device), 5) is None
    assert plan(table([0], [1], device), 0) is None


def test_table_refuses_what_a_kernel_cannot_read(device: torch.device) -> None:
    deltas = DeltaTable([(64, 256)], 1, device)
    good = on_device(random_coded("int4", (64, 256)).delta(), device)
    codes = torch.empty(good.tensors["codes"].numel() + 1, dtype=torch.uint8, device=device)[1:]
    shifted = dict(good.tensors, codes=codes.view(good.tensors["codes"].shape))
    with pytest.raises(ValueError, match=r"codes must be contiguous.*multiple of 16 bytes"):
        deltas.set(0, [PackedDelta("int4", (64, 256), shifted)])
    with pytest.raises(ValueError, match=r"values must be torch\.bfloat16"):
        deltas.set(0, [on_device(random_raw((64, 256), dtype=torch.float16), device)])
    with pytest.raises(ValueError, match="does not fit a part"):
        deltas.set(0, [on_device(random_coded("int4", (64, 128)).delta(), device)])
    with pytest.raises(ValueError, match="has 1 parts"):
        deltas.set(0, [good, None])
    with pytest.raises(ValueError, match="of one K"):
        DeltaTable([(64, 256), (64, 128)], 1, device)
    assert not deltas.codecs
    deltas.set(0, [good])
    assert deltas.codecs == ("int4",)
    deltas.set(0, [None])
    assert not deltas.codecs


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_captured_graph_serves_other_mixtures_and_slots(device: torch.device) -> None:
    shape, rows = (256, 512), 90
    coded = [random_coded(codec, shape, seed) for seed, codec in enumerate(["int2", "int4", "int2"])]
    deltas = DeltaTable([shape], 2, device)
    deltas.set(0, [on_device(coded[0].delta(), device)])
    x = torch.randn(rows, shape[1], device=device)
    y = torch.zeros(rows, shape[0], device=device)
    segments = table([90, 0, 0], [0, 0, 0], device)

    def step() -> None:
        y.zero_()
        grouped_matmul(y, quantize_rows(x), deltas, planned(segments, rows), ["int4", "int2"])

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for lengths, slots, held in (([20, 70, 0], [0, 1, -1], (0, 1)), ([1, 3, 80], [1, -1, 0], (2, 1))):
        for slot, index in enumerate(held):
            deltas.set(slot, [on_device(coded[index].delta(), device)])
        new = table(lengths, slots, device)
        segments.starts.copy_(new.starts)
        segments.slots.copy_(new.slots)
        x.copy_(torch.randn_like(x))
        graph.replay()
        want = torch.zeros_like(y, dtype=torch.float64)
        for slot, first, length in zip(slots, [0, *accumulate(lengths)], lengths, strict=False):
            if slot >= 0:
                part = slice(first, first + length)
                want[part] = rounded(x)[part] @ coded[held[slot]].dense().to(device).T
        assert float((y.double() - want).abs().max()) <= 1e-6 * float(want.abs().max())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_overlapping_launches_change_no_bit(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chains in which each launch needs what the one ahead wrote, with single rows beside a long segment."""
    shape = (1024, 1024)
    tile = Tile(64, 4, 3, 2)  # programs share K
    names = ["int2", LOW_RANK]
    deltas = DeltaTable([shape], 2, device)
    deltas.set(0, [on_device(random_coded("int2", shape).delta(), device)])
    deltas.set(1, [on_device(random_low_rank(shape, 16), device)])
    segments = table([1, 100, 2], [0, 0, 1], device)
    weight = torch.randn(shape, device=device, dtype=torch.bfloat16) / 32
    ones = torch.ones(1, shape[1], device=device, dtype=torch.bfloat16)
    zeros = torch.zeros(103, dtype=torch.int32, device=device)
    start = torch.randn(103, shape[1], device=device, dtype=torch.bfloat16)

    def chain() -> Tensor:
        x = start
        work = planned(segments, len(x))
        for _ in range(20):
            x, rows = quantize.rms_norm_quantize(x, ones, zeros, 1e-5)
            y = torch.nn.functional.linear(x, weight)
            grouped_matmul(y, rows, deltas, work, names[:1], tile)
            low_rank_matmul(y, x, deltas, work, 16)
            x = y
        return x

    overlapped = [chain() for _ in range(10)]
    for module in (quantize, triton_backend):
        monkeypatch.setattr(module, "overlap", lambda *_, **__: {"OVERLAP": False})
    plain = chain()
    assert bool(plain.isfinite().all())
    assert all(torch.equal(x, plain) for x in overlapped)
