"""Attention that can be captured in CUDA graphs, for decodes."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from deltazip_ray.kvcache.block_manager import BlockTable
from deltazip_ray.layers.attention.backend import AttentionBackend, PlanT


class CapturableBackend(AttentionBackend[PlanT]):
    """Decodes with tables at fixed device addresses. Before each replay, call ``fill`` and send the tables."""

    @abstractmethod
    def graph_inputs(self, rows: int, pages: int) -> dict[str, int]:
        """Names and lengths of int32 tables for up to ``rows`` sequences of ``pages`` pages in all.

        Of the last only what is used has to be sent.
        """

    @abstractmethod
    def captured_plan(self, where: torch.Tensor, tables: Mapping[str, torch.Tensor]) -> PlanT:
        """A plan of ``len(where)`` decodes with the tables on the device, to be captured."""

    @abstractmethod
    def fill(self, positions: np.ndarray, blocks: Sequence[BlockTable], tables: Mapping[str, np.ndarray]) -> int:
        """Write the tables of a step of decodes, and ``where`` its keys and values go; how long the last one is.

        Each decode is the token at one of ``positions`` ``[n]`` of a sequence that has ``blocks``.
        """
