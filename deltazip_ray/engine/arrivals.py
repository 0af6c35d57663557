"""Steps that use a version while its weights are still being copied.

On an idle engine, a version can be used as soon as its copies are enqueued: the host launches the first step meanwhile,
and the device starts each layer when that layer's weights have arrived. PipeSwitch (Bai et al., OSDI 2020) loads whole
models this way.
"""

import re
from collections.abc import Iterable, Mapping
from concurrent.futures import Future
from functools import lru_cache

import torch

Mark = Future["torch.cuda.Event | None"]
"""Done when all copies before it are enqueued; its result is a CUDA event after them (None on a CPU)."""

_LAYER = re.compile(r"\.(\d+)\.")


@lru_cache(8192)
def layer_of(weight: str) -> int | None:
    """The decoder layer that a weight belongs to; None if it belongs to none."""
    found = _LAYER.search(weight)
    return None if found is None else int(found[1])


class Arrival:
    """A version that is being copied to a slot."""

    def __init__(self, marks: Mapping[int | None, Mark], small: "torch.cuda.Event | None") -> None:
        """``marks`` after the last weight of each layer (None: of no layer), in the order of the copies.

        ``small``: an event after all other writes; None on a CPU.
        """
        self._marks = marks
        self._small = small

    def wait(self, layer: int | None) -> None:
        """Make later launches wait for a layer's weights; None, called first: for the weights of no layer.

        Blocks until the copies are enqueued. Raises RuntimeError when one fails.
        """
        if layer is None:
            _await(self._small)
        if layer in self._marks:
            _await(self._marks[layer].result())

    def wait_for_all(self) -> None:
        """:meth:`wait` for all weights."""
        _await(self._small)
        for mark in self._marks.values():
            _await(mark.result())


def wait_for_layer(arrivals: Iterable[Arrival], layer: int | None) -> None:
    """See :meth:`Arrival.wait`."""
    for arrival in arrivals:
        arrival.wait(layer)


def _await(event: "torch.cuda.Event | None") -> None:
    if event is not None:
        torch.cuda.current_stream().wait_event(event)
