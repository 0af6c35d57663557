"""One decoder layer of an 8B Llama in a decode step, without attention: what the deltas add to it as a whole."""

from collections.abc import Iterator, Sequence
from functools import partial
from statistics import median

import torch
from torch import Tensor

from deltazip_kernels.bench.data import DEVICE, SHAPES, make_tables, segments_of
from deltazip_kernels.bench.result import Result
from deltazip_kernels.bench.timing import times_in_turns
from deltazip_kernels.plan import MORE, SOME, Work, plan
from deltazip_kernels.quantize import QuantizedRows, quantize_rows, rms_norm_quantize, silu_mul_quantize
from deltazip_kernels.rope import RotaryTables, rope_and_cache
from deltazip_kernels.skinny import MOST_ROWS, BaseProduct
from deltazip_kernels.triton_backend import grouped_matmul

_HIDDEN, _GROUPS, _HEAD = 4096, 8, 128
_FIRST_ROWS = 32
_LAYERS = 2  # in turn, so that no weight is in the L2
_BUSY = 1.2
"""Seconds for which a layer is repeated: by then a GPU whose power is limited has lowered its clock, as in a step."""


class Layer:
    """Weights of one layer and a table of ``codec`` deltas for each linear; without ``work`` the base alone."""

    def __init__(self, rows: int, slots: int, codec: str, work: Work | None) -> None:
        self.product = BaseProduct(DEVICE)
        self.work = work
        self.codec = codec
        self.deltas = torch.zeros(MOST_ROWS * 2 * 14336, device=DEVICE, dtype=torch.bfloat16)
        self.weights = {name: _random(sum(n for n, _ in shapes), shapes[0][1]) for name, shapes in SHAPES.items()}
        made = {name: make_tables(shapes, [codec] * slots, 0) for name, shapes in SHAPES.items()}
        self.tables = {name: tables[0] for name, (tables, _) in made.items()}
        self.bytes = sum(size for _, size in made.values())
        self.norm = torch.ones((slots + 1, _HIDDEN), device=DEVICE, dtype=torch.bfloat16)
        self.which = (torch.arange(rows, device=DEVICE) % slots).int()
        self.places = torch.arange(rows, device=DEVICE)
        angles = torch.rand((rows, _HEAD // 2), device=DEVICE)
        self.rotary = RotaryTables(angles.cos(), angles.sin())
        self.cache = torch.zeros((2, 1, rows, _GROUPS, _HEAD), device=DEVICE, dtype=torch.bfloat16)

    def step(self, stream: Tensor, update: Tensor) -> None:
        """``stream`` and ``update`` [T, hidden]; q stands for what attention makes of it."""
        x, rounded = rms_norm_quantize(update, self.norm, self.which, 1e-5, stream)
        keys, values = self.cache
        qkv = self._linear("qkv", x, rounded)
        q = rope_and_cache(qkv, self.places, self.rotary, keys, values, self.places).flatten(1)
        update = self._linear("o", q, quantize_rows(q))
        x, rounded = rms_norm_quantize(update, self.norm, self.which, 1e-5, stream)
        x, rounded = silu_mul_quantize(self._linear("gate_up", x, rounded))
        self._linear("down", x, rounded)

    def _linear(self, name: str, x: Tensor, rounded: QuantizedRows) -> Tensor:
        weight = self.weights[name]
        y = torch.empty((len(x), len(weight)), dtype=x.dtype, device=x.device)
        if self.work is None:
            self.product(y, x, weight)
        elif len(x) <= _FIRST_ROWS and self.product.cut(x, weight) is not None:
            deltas = self.deltas[: y.numel()].view(y.shape)
            grouped_matmul(deltas, rounded, self.tables[name], self.work, [self.codec], starts_early=True)
            self.product(y, x, weight, deltas)
        else:
            self.product(y, x, weight)
            grouped_matmul(y, rounded, self.tables[name], self.work, [self.codec])
        return y


def layers(codec: str, batches: Sequence[tuple[int, int]]) -> Iterator[Result]:
    """``(versions, rows of each)``; ``reference`` is the same layer without deltas."""
    for count, each in batches:
        rows = count * each
        longest = next(limit for limit in (SOME, MORE, rows) if limit >= each)
        work = plan(segments_of([each] * count), rows, longest)  # for any mixture like it, as a captured step has it
        stack = [Layer(rows, count, codec, work) for _ in range(_LAYERS)]
        state = _random(rows, _HIDDEN), _random(rows, _HIDDEN)
        times = _times(stack, state)
        for layer in stack:
            layer.work = None
        alone = median(_times(stack, state))
        yield Result("layer", codec, "all", f"{count}x{each}", rows, stack[0].bytes, times, alone)


def _times(stack: Sequence[Layer], state: tuple[Tensor, Tensor]) -> list[float]:
    return times_in_turns({"layer": [partial(layer.step, *state) for layer in stack] * 3}, _BUSY)["layer"]


def _random(rows: int, columns: int) -> Tensor:
    return torch.randn((rows, columns), device=DEVICE, dtype=torch.bfloat16) * 0.02
