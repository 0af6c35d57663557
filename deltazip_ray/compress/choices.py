"""The choices and the budget of bit allocation."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import isfinite, prod

from torch import Tensor

from deltazip_kernels.layout import packed_layout
from deltazip_ray.compress.adapter import LowRank
from deltazip_ray.compress.allocation import Choice
from deltazip_ray.compress.options import Coding, CompressOptions
from deltazip_ray.errors import CompressionError

BLOB_HEADER = 8 + 64
"""Bytes of a blob's header besides the descriptions of its tensors, at most: the length field and padding."""


@dataclass
class Survey:
    """The input of bit allocation for one fine-tune."""

    choices: dict[str, list[Choice]] = field(default_factory=dict)
    """For every matrix that differs from the base's, by weight."""
    weights: int = 0
    """Number of elements of those matrices."""
    fixed: int = 0
    """Bytes of everything else in the blobs: norms, biases, added rows, products of adapters, headers."""

    def add(self, name: str, finetuned: Tensor, costs: Mapping[Coding, float]) -> None:
        """Add a matrix with the cost of each of its codings except raw, which costs nothing.

        Raises CompressionError when a cost is not finite.
        """
        if not all(map(isfinite, costs.values())):
            raise CompressionError(
                f"the gradients of {name} overflow on the calibration data: compress with dtype float32 or bfloat16"
            )
        self.choices[name] = [
            Choice(coding, stored_bytes(name, finetuned, coding), cost)
            for coding, cost in {**costs, "raw": 0.0}.items()
        ]
        self.weights += finetuned.numel()

    def add_rest(self, name: str, values: Tensor) -> None:
        """Count a weight that is kept raw, if it has any rows."""
        if len(values):
            self.fixed += stored_bytes(name, values, "raw")

    def add_product(self, name: str, product: LowRank) -> None:
        """Count a delta that is kept as a low-rank product."""
        self.fixed += (
            product.nbytes + _described(f"{name}.down", product.shape) + _described(f"{name}.up", product.shape)
        )

    def budget(self, options: CompressOptions, weights: int) -> int:
        """Bytes that the matrices may take under the target; the whole fine-tune has ``weights`` elements.

        Raises CompressionError when everything else already takes more than the ratio allows.
        """
        if options.target_bits is not None:
            return int(options.target_bits * self.weights / 8)
        if options.target_ratio is None:
            raise ValueError("a budget needs target_bits or target_ratio")
        room = int(2 * weights / options.target_ratio) - self.fixed
        if room < 0:
            raise CompressionError(
                f"norms, biases, added tokens and headers alone take {-room} bytes more than a ratio of "
                f"{options.target_ratio:g} allows: ask for a lower one"
            )
        return room


def stored_bytes(name: str, values: Tensor, coding: Coding) -> int:
    """Upper bound of the bytes that a weight takes in its blob, including its share of the header."""
    if coding == "absent":
        return 0
    if coding == "raw":
        return values.nbytes + _described(name, tuple(values.shape))
    layout = packed_layout(coding, (values.shape[0], values.shape[1]))
    return sum(
        prod(shape) * dtype.itemsize + _described(f"{name}.{part}", shape) for part, (shape, dtype) in layout.items()
    )


def _described(name: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor's description in a safetensors header, assuming offsets of ten digits."""
    offsets = [10**9, 10**9]
    entry = {name: {"dtype": "BF16", "shape": shape, "data_offsets": offsets}}
    return len(json.dumps(entry, separators=(",", ":")))
