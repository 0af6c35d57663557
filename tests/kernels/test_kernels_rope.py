"""Head norms, rotation and the write to the cache in one launch, against the same written in torch."""

import pytest
import torch
from torch import Tensor

from deltazip_kernels.rope import HeadNorm, RotaryTables, rope_and_cache

POSITIONS = 50
BLOCKS, PAGE = 3, 4


def make_tables(half: int, device: torch.device) -> RotaryTables:
    angles = torch.arange(POSITIONS)[:, None] * 100.0 ** -(torch.arange(half) / half)
    return RotaryTables(angles.cos().to(device), angles.sin().to(device))


def rotated(x: Tensor, positions: Tensor, tables: RotaryTables) -> Tensor:
    """``x`` [T, heads, D], float64."""
    half = tables.cos.shape[1]
    cos, sin = (table[positions].double().repeat(1, 2)[:, None] for table in (tables.cos, tables.sin))
    turned, rest = x.double().split([2 * half, x.shape[2] - 2 * half], dim=2)
    left, right = turned.chunk(2, dim=2)
    return torch.cat((turned * cos + torch.cat((-right, left), dim=2) * sin, rest), dim=2)


def normed(x: Tensor, weights: Tensor, norm: HeadNorm) -> Tensor:
    root = (x.float().square().mean(2, keepdim=True) + norm.epsilon).rsqrt()
    return weights[norm.which.long()][:, None] * (x.float() * root).to(x.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("with_norm", [False, True])
@pytest.mark.parametrize(
    ("heads", "groups", "dim", "half"), [(4, 2, 64, 32), (5, 1, 80, 10), (3, 3, 24, 12), (32, 8, 128, 64)]
)
def test_norms_rotates_and_caches(
    heads: int, groups: int, dim: int, half: int, with_norm: bool, dtype: torch.dtype, device: torch.device
) -> None:
    generator = torch.Generator().manual_seed(heads)
    rows = 6

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    qkv = random(rows, (heads + 2 * groups) * dim + 16)[:, :-16]
    positions = torch.tensor([0, 7, 49, 3, 3, 0], device=device)
    where = torch.tensor([11, 3, -1, 0, 5, -1], device=device)
    caches = random(BLOCKS, 2, PAGE, groups, dim)  # blocks of k and v in turn: both strided
    before = caches.clone()
    which = torch.tensor([0, 2, 1, 1, 0, 2], dtype=torch.int32, device=device)
    norm = HeadNorm(random(3, dim), random(3, dim), which, 1e-6) if with_norm else None
    tables = make_tables(half, device)
    got = rope_and_cache(qkv, positions, tables, caches[:, 0], caches[:, 1], where, norm)

    q, k, v = qkv.unflatten(1, (-1, dim)).split([heads, groups, groups], dim=1)
    if norm is not None:
        q, k = normed(q, norm.q, norm), normed(k, norm.k, norm)
    want, kept = rotated(q, positions, tables), where >= 0
    # The rounding of the output, and of what the norm's float32 mean may tip over before it.
    epsilon = torch.finfo(dtype).eps * (4 if with_norm or device.type == "cpu" else 1)
    torch.testing.assert_close(got.double(), want, rtol=epsilon, atol=4 * epsilon)
    rows_of = caches.transpose(1, 2).flatten(0, 1)
    cached = rows_of[where[kept]]
    torch.testing.assert_close(
        cached[:, 0].double(), rotated(k, positions, tables)[kept], rtol=epsilon, atol=4 * epsilon
    )
    assert torch.equal(cached[:, 1], v[kept])
    others = [row for row in range(BLOCKS * PAGE) if row not in where.tolist()]
    assert torch.equal(rows_of[others], before.transpose(1, 2).flatten(0, 1)[others])


def test_no_rows_and_misfits(device: torch.device) -> None:
    tables, cache = make_tables(16, device), torch.zeros(2, 4, 2, 32, device=device)
    none = torch.zeros(0, dtype=torch.int64, device=device)
    assert rope_and_cache(torch.zeros(0, 256, device=device), none, tables, cache, cache, none).shape == (0, 4, 32)
    for width in (128, 250):
        with pytest.raises(ValueError, match="do not fit a cache"):
            rope_and_cache(torch.zeros(1, width, device=device), none, tables, cache, cache, none)
    with pytest.raises(ValueError, match="blocks of the caches must be contiguous"):
        rope_and_cache(torch.zeros(1, 256, device=device), none, tables, cache.mT.contiguous().mT, cache, none)


@pytest.mark.parametrize(("heads", "groups", "dim", "half"), [(4, 2, 64, 32), (5, 1, 80, 10)])
def test_a_cache_in_fp8_has_a_scale_for_each_token_and_head(
    heads: int, groups: int, dim: int, half: int, device: torch.device
) -> None:
    generator = torch.Generator().manual_seed(dim)
    blocks, page = 4, 5
    qkv = torch.randn(5, (heads + 2 * groups) * dim, generator=generator).to(device)
    qkv[1] *= 1e4  # beyond what e4m3 has without a scale
    qkv[3] = 0
    positions, where = torch.tensor([0, 7, 49, 3, 3], device=device), torch.tensor([6, 0, -1, 1, 15], device=device)
    tables = make_tables(half, device)
    k_cache, v_cache = torch.ones((2, blocks, page, groups, dim), device=device).to(torch.float8_e4m3fn)
    scales = torch.full((blocks, 2, groups, page), -1.0, device=device)
    q = rope_and_cache(qkv, positions, tables, k_cache, v_cache, where, None, scales)

    plain = torch.zeros(2, blocks, page, groups, dim, device=device)
    assert torch.equal(q, rope_and_cache(qkv, positions, tables, plain[0], plain[1], where))
    for i, stored in enumerate((k_cache, v_cache)):
        for row in (6, 0, 1, 15):
            scale = scales[row // page, i, :, row % page]
            wanted = plain[i].flatten(0, 1)[row]
            torch.testing.assert_close(scale, wanted.abs().amax(-1) / 448, rtol=1e-6, atol=1e-30)
            got = stored.float().flatten(0, 1)[row] * scale[:, None]
            near = (got - wanted).abs() <= wanted.abs() / 16 + scale[:, None] / 512
            # Triton's interpreter loses the carry when rounding reaches the next power of two.
            assert near.all() if device.type == "cuda" else near.float().mean() > 0.8
    assert (scales == -1).sum() == scales.numel() - 4 * 2 * groups
