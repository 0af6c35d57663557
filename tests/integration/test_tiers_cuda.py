"""Copies to a real device, beside work that it does."""

import gc
import logging
import mmap
import tempfile
import warnings

import numpy as np
import pytest
import torch

from deltazip_ray.engine.uploads import Uploads
from deltazip_ray.residency.tiers import HostMemory

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
SIZE = 96 << 20


def read_only_mapping(data: bytes) -> HostMemory:
    """What a replica has of the node store's arena."""
    with tempfile.TemporaryFile(dir="/dev/shm") as file:
        file.write(data)
        file.flush()
        return HostMemory(memoryview(mmap.mmap(file.fileno(), len(data), prot=mmap.PROT_READ)))


@pytest.mark.parametrize("locked", [True, False])
def test_all_bytes_are_there_for_every_stream_when_the_block_ends(
    locked: bool, caplog: pytest.LogCaptureFixture
) -> None:
    data = np.random.default_rng(0).bytes(SIZE)
    memory = read_only_mapping(data)
    source = _tensor(memory)
    device = torch.device("cuda")
    uploads, target = Uploads(device), torch.zeros(SIZE, dtype=torch.uint8, device=device)
    busy = torch.randn(4096, 4096, device=device)
    with caplog.at_level(logging.WARNING):
        if locked:
            uploads.lock_pages(memory)
        for _ in range(20):
            busy = (busy @ busy).clamp(-1, 1)
        with uploads.beside_steps() as upload:
            upload.copy(target, source)
        other = torch.cuda.Stream()
        with torch.cuda.stream(other):
            found = target.clone()
    assert found.cpu().numpy().tobytes() == data
    assert caplog.messages == []


def test_memory_is_let_go_before_it_is_unmapped() -> None:
    uploads = Uploads(torch.device("cuda"))
    for seed in range(3):  # mappings get the same address again, and register again
        memory = read_only_mapping(np.random.default_rng(seed).bytes(SIZE))
        uploads.lock_pages(memory)
        uploads.lock_pages(memory)
        del memory
        gc.collect()
    torch.cuda.synchronize()


def _tensor(memory: HostMemory) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it may not be written
        return torch.frombuffer(memory.view, dtype=torch.uint8)
