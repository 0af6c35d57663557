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
        """Names and lengths of the int32 tables for up to ``rows`` sequences with ``pages`` pages in total.

        Only the used part of the last table has to be sent.
        """

    @abstractmethod
    def captured_plan(self, where: torch.Tensor, tables: Mapping[str, torch.Tensor]) -> PlanT:
        """A plan of ``len(where)`` decodes with the tables on the device, to be captured."""

    @abstractmethod
    def fill(self, positions: np.ndarray, blocks: Sequence[BlockTable], tables: Mapping[str, np.ndarray]) -> int:
        """Write the tables of a step of decodes, and its ``where``; returns the used length of the last table.

        Decode ``i`` is the token at ``positions[i]`` of a sequence with ``blocks[i]``.
        """
