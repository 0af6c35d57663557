"""Coding with group scales, in torch: the reference for every codec and device. ``triton_grid`` does the same on GPUs.

A group is up to 128 consecutive columns of one row; ``weight = (code - zero) * scale``.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from deltazip_kernels.layout import GROUP, Codec

CLIP_HIGHEST, CLIP_STEP = 1.15, 0.05
CLIP_RATIOS = tuple(CLIP_HIGHEST - CLIP_STEP * step for step in range(19))
"""Scales to try for a group, relative to the scale at which the lowest level is the group's largest magnitude. Above 1
because int4 has one positive level less than negative ones."""
REFITS = 2


@dataclass(frozen=True)
class Coded:
    """A coded matrix ``[N, K]``: the input of :func:`deltazip_kernels.layout.pack`."""

    codes: Tensor
    """u8 ``[N, K]``."""
    scales: Tensor
    """float32 ``[N, ceil(K / 128)]``, representable in bf16."""
    kept: Tensor | None
    """bool ``[N, K]``, two of every four columns; None for dense codecs."""

    def dequantized(self, codec: Codec) -> Tensor:
        """The matrix that the codes represent, float32 ``[N, K]``."""
        # In place, and without an expanded copy of the scales: a head has half a billion weights.
        values = self.codes.float().sub_(codec.zero)
        whole = values.shape[1] // GROUP * GROUP
        values[:, :whole].unflatten(1, (-1, GROUP)).mul_(self.scales[:, : whole // GROUP, None])
        values[:, whole:].mul_(self.scales[:, whole // GROUP :])
        return values if self.kept is None else values.masked_fill_(~self.kept, 0.0)

    def rows(self, selected: slice) -> "Coded":
        """Some rows of it."""
        kept = None if self.kept is None else self.kept[selected]
        return Coded(self.codes[selected], self.scales[selected], kept)

    @staticmethod
    def join(pieces: Sequence["Coded"]) -> "Coded":
        """The rows of all ``pieces``, in order."""
        masks = [piece.kept for piece in pieces if piece.kept is not None]
        codes, scales = torch.cat([piece.codes for piece in pieces]), torch.cat([piece.scales for piece in pieces])
        return Coded(codes, scales, torch.cat(masks) if masks else None)


def to_codes(values: Tensor, scales: Tensor, codec: Codec) -> Tensor:
    """The nearest codes, as whole float numbers, of ``values`` for ``scales`` that broadcast against them.

    A scale may be 0; then every code represents 0.
    """
    steps = torch.where(scales > 0, values / scales.clamp_min(torch.finfo(torch.float32).tiny), 0.0)
    return (steps + codec.zero).round_().clamp_(0, 2**codec.bits - 1)


def choose_scales(values: Tensor, weights: Tensor, codec: Codec) -> Tensor:
    """Scales ``[N]`` of one group ``[N, columns]`` that minimize the squared error weighted by ``weights``.

    ``weights`` broadcast against ``values``; 0 for a column that is not kept. Tries the clip ratios, then refits the
    best scale to its codes by least squares. Candidates are rounded to bf16, in which scales are stored, before their
    error is computed.
    """
    weights = weights.expand_as(values)
    best = torch.zeros(values.shape[0], device=values.device)
    best_error = (weights * values.square()).sum(1)
    widest = (values * (weights > 0)).abs().amax(1) / codec.zero

    def consider(candidates: Tensor) -> None:
        scales = candidates.bfloat16().float()
        rounded = (to_codes(values, scales[:, None], codec) - codec.zero) * scales[:, None]
        error = (weights * (values - rounded).square()).sum(1)
        better = error < best_error
        torch.where(better, scales, best, out=best)
        torch.where(better, error, best_error, out=best_error)

    for ratio in CLIP_RATIOS:
        consider(widest * ratio)
    for _ in range(REFITS):
        levels = to_codes(values, best[:, None], codec) - codec.zero
        norm = (weights * levels.square()).sum(1)
        consider((weights * values * levels).sum(1).clamp_min(0) / norm.clamp_min(torch.finfo(torch.float32).tiny))
    return best


def keep_two_of_four(saliency: Tensor) -> Tensor:
    """The 2:4 mask of the largest ``saliency`` ``[N, columns]``; an incomplete four at the end keeps up to two."""
    kept = torch.zeros_like(saliency, dtype=torch.bool)
    whole = saliency.shape[1] // 4 * 4
    fours = torch.unflatten(saliency[:, :whole], 1, (-1, 4))
    torch.unflatten(kept[:, :whole], 1, (-1, 4)).scatter_(2, fours.topk(2, dim=2).indices, True)
    rest = saliency[:, whole:]
    if rest.shape[1]:
        kept[:, whole:].scatter_(1, rest.topk(min(2, rest.shape[1]), dim=1).indices, True)
    return kept


def round_to_nearest(delta: Tensor, weights: Tensor, codec: Codec) -> Coded:
    """Code ``delta`` float32 ``[N, K]`` without compensation; ``weights`` ``[K]`` of the columns' squared errors."""
    kept = keep_two_of_four(delta.square() * weights) if codec.sparse else None
    counted = weights.expand_as(delta) if kept is None else weights * kept
    groups = [slice(start, start + GROUP) for start in range(0, delta.shape[1], GROUP)]
    scales = torch.stack([choose_scales(delta[:, g], counted[:, g], codec) for g in groups], 1)
    columns = scales.repeat_interleave(GROUP, dim=1)[:, : delta.shape[1]]
    return Coded(to_codes(delta, columns, codec).to(torch.uint8), scales, kept)


def code_group(work: Tensor, codes: Tensor, kept: Tensor | None, factor: Tensor, codec: Codec) -> tuple[Tensor, Tensor]:
    """Code the columns of one group ``work`` ``[N, columns]`` in order, spreading each error over the later columns.

    Writes ``codes`` and, for 2:4, ``kept``, which may be slices; the content of ``work`` is destroyed. Returns the
    scales ``[N]`` and the errors ``[N, columns]`` to spread over later groups. ``factor`` ``[columns, columns]`` is the
    group's diagonal block of ``hessian.inverse_factor``.
    A column's error costs ``(error / factor_jj)²`` after the later columns have compensated for it. This weights the
    choice of scales and, with the whole value as the error, is SparseGPT's saliency.
    """
    cost = factor.diagonal().square().reciprocal()
    # The mask is decided four columns at a time below; the scales are chosen for what it would be now.
    likely = work.new_ones(()) if kept is None else keep_two_of_four(work.square() * cost)
    scales = choose_scales(work, cost * likely, codec)
    errors = torch.zeros_like(work)
    for j in range(work.shape[1]):
        if kept is not None and j % 4 == 0:
            kept[:, j : j + 4] = keep_two_of_four(work[:, j : j + 4].square() * cost[j : j + 4])
        column = work[:, j]
        code = to_codes(column, scales, codec)
        value = (code - codec.zero) * scales
        if kept is not None:
            value = value * kept[:, j]
        codes[:, j] = code
        errors[:, j] = (column - value) / factor[j, j]
        work[:, j + 1 :].addr_(errors[:, j], factor[j, j + 1 :], alpha=-1)
    return scales, errors


def improve_group(
    delta: Tensor, lost: Tensor, codes: Tensor, scales: Tensor, slopes: Tensor, metric: Tensor, codec: Codec
) -> None:
    """One round of coordinate descent over one group: the best scale for the codes, then each code in turn.

    ``delta`` ``[N, columns]`` is the target. Updates ``codes`` u8, ``lost`` (target minus reconstruction, same shape)
    and ``scales`` ``[N]``, all of which may be slices. ``slopes`` ``[N, columns]`` are the rows' losses times the
    columns of the damped Hessian, which is minus half the gradient of the squared error; ``metric`` ``[columns,
    columns]`` is the group's diagonal block of the Hessian. No row's error increases. Dense codecs only.
    """
    levels = codes.float().sub_(codec.zero)
    along = levels @ metric
    change = _better_scale(levels, scales, slopes, along)
    scales += change
    _recode(codes, scales, slopes - change[:, None] * along, metric, codec)
    torch.sub(delta, (codes.float() - codec.zero) * scales[:, None], out=lost)


def _better_scale(levels: Tensor, scales: Tensor, slopes: Tensor, along: Tensor) -> Tensor:
    """The change of the scales ``[N]`` of one group for fixed ``levels``; 0 where rounding to bf16 undoes the gain.

    ``along`` is ``levels`` times the metric.
    """
    curvature = (levels * along).sum(1)
    slope = (levels * slopes).sum(1)
    best = scales + slope / curvature.clamp_min(torch.finfo(torch.float32).tiny)
    change = best.clamp_min(0.0).bfloat16().float() - scales
    return torch.where(change * (change * curvature - 2 * slope) < 0, change, 0.0)


def _recode(codes: Tensor, scales: Tensor, slopes: Tensor, metric: Tensor, codec: Codec) -> None:
    """Give each column in turn its best code while all other codes and the ``scales`` stay fixed."""
    # Transposed, so that the operations on one column touch contiguous memory.
    levels, slopes = codes.T.float().sub_(codec.zero), slopes.T.contiguous()
    steps = torch.where(scales > 0, scales.clamp_min(torch.finfo(torch.float32).tiny).reciprocal(), 0.0)
    half = codec.zero % 1
    for level, slope, weights, own in zip(levels, slopes, metric, metric.diagonal().tolist(), strict=True):
        best = torch.addcmul(level, slope, steps, value=1 / own).add_(half).round_().sub_(half)
        best.clamp_(-codec.zero, 2**codec.bits - 1 - codec.zero)
        slopes.addr_(weights, (best - level).mul_(scales), alpha=-1)
        level.copy_(best)
    codes.copy_(levels.add_(codec.zero).T)
