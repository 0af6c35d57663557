"""Weights that are on their way to a slot, and a step that uses them as they come.

On an engine with nothing else to do, a version may be used as soon as its copies are ordered: the host launches the
first step meanwhile, and the device begins each layer when that layer's weights are there. Whole models were loaded so
by PipeSwitch (Bai et al., OSDI 2020).
"""

import re
from collections.abc import Iterable, Mapping
from concurrent.futures import Future
from functools import lru_cache

import torch

Mark = Future["torch.cuda.Event | None"]
"""Comes when all copies before it are ordered, with an event behind them if the device is not the CPU."""

_LAYER = re.compile(r"\.(\d+)\.")


@lru_cache(8192)
def layer_of(weight: str) -> int | None:
    """The decoder layer that a weight belongs to; None: to none of them."""
    found = _LAYER.search(weight)
    return None if found is None else int(found[1])


class Arrival:
    """One version on its way to one slot."""

    def __init__(self, marks: Mapping[int | None, Mark], small: "torch.cuda.Event | None") -> None:
        """``marks``, in the order of the copies: behind the last weight of each layer, and of none.

        ``small``: an event behind what was written besides, if the device is not the CPU.
        """
        self._marks = marks
        self._small = small

    def wait(self, layer: int | None) -> None:
        """Let what is launched from now on wait for a layer's weights; None: for those of no layer, before all others.

        This thread waits until their copies are ordered. Raises RuntimeError when one cannot be made.
        """
        if layer is None:
            _await(self._small)
        if layer in self._marks:
            _await(self._marks[layer].result())

    def wait_for_all(self) -> None:
        """As :meth:`wait`, for every weight."""
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
