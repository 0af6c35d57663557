"""What int8 activations cost a trained network, next to what its codec costs."""

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, silu

from deltazip_kernels import PackedDelta, Segments, delta_matmul, pack

WIDTHS = (96, 320, 96)


def train(weights: list[Tensor], task: Tensor, x: Tensor, steps: int) -> list[Tensor]:
    """Full-batch Adam towards ``task``'s outputs; returns new weights."""
    trained = [nn.Parameter(w.clone()) for w in weights]
    optimizer = torch.optim.Adam(trained, lr=3e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (linear(silu(linear(x, trained[0])), trained[1]) - x.sin() @ task).square().mean()
        loss.backward()
        optimizer.step()
    return [p.detach() for p in trained]


def round_to_nearest(delta: Tensor) -> PackedDelta:
    """The delta in int4, scales from the largest magnitude of each group."""
    rows, columns = delta.shape
    groups = torch.nn.functional.pad(delta, (0, -columns % 128)).view(rows, -1, 128)
    scales = (groups.abs().amax(-1) / 7.5).bfloat16()
    codes = (groups / scales.float().unsqueeze(-1) + 8).round().clamp(0, 15).to(torch.uint8).flatten(1)
    return PackedDelta("int4", (rows, columns), pack("int4", codes[:, :columns], scales))


def run(x: Tensor, weights: list[Tensor], deltas: list[PackedDelta], backend: str) -> Tensor:
    segments = Segments(torch.tensor([0, len(x)], dtype=torch.int32), torch.tensor([0], dtype=torch.int32))
    segments = Segments(segments.starts.to(x.device), segments.slots.to(x.device))
    for i, (weight, delta) in enumerate(zip(weights, deltas, strict=True)):
        y = linear(x, weight)
        delta_matmul(y, x, [delta], segments, backend=backend)
        x = silu(y) if i == 0 else y
    return x


def test_int8_activations_cost_less_than_the_codec(device: torch.device) -> None:
    torch.manual_seed(0)
    x = torch.randn(256, WIDTHS[0])
    start = [torch.randn(WIDTHS[i + 1], WIDTHS[i]) / WIDTHS[i] ** 0.5 for i in range(2)]
    base = train(start, torch.randn(WIDTHS[0], WIDTHS[2]) / 10, x, 100)
    tuned = train(base, torch.randn(WIDTHS[0], WIDTHS[2]) / 10, x, 100)
    coded = [round_to_nearest(t - b) for t, b in zip(tuned, base, strict=True)]
    deltas = [PackedDelta(d.codec, d.shape, {k: v.to(device) for k, v in d.tensors.items()}) for d in coded]
    held_out = torch.randn(24, WIDTHS[0], device=device)
    base, tuned = [w.to(device) for w in base], [w.to(device) for w in tuned]
    exact = linear(silu(linear(held_out, tuned[0])), tuned[1])
    with_codec = run(held_out, base, deltas, "torch")
    with_int8 = run(held_out, base, deltas, "triton")
    codec_error = float((with_codec - exact).norm())
    assert 0 < float((with_int8 - with_codec).norm()) < 0.5 * codec_error
    assert codec_error < 0.1 * float(exact.norm())
