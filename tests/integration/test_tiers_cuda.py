"""Copies to a real device, beside work that it does."""

import gc
import logging
import mmap
import tempfile
import time
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from deltazip_ray.engine.uploads import Uploads
from deltazip_ray.layers.staging import to_device
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


def test_memory_is_let_go_before_it_is_unmapped(caplog: pytest.LogCaptureFixture) -> None:
    uploads = Uploads(torch.device("cuda"))
    for seed in range(3):  # mappings get the same address again, and register again
        memory = read_only_mapping(np.random.default_rng(seed).bytes(SIZE))
        with caplog.at_level(logging.WARNING):
            uploads.lock_pages(memory)
            uploads.lock_pages(memory)
        assert _tensor(memory).is_pinned()
        del memory
        gc.collect()
    torch.cuda.synchronize()
    assert caplog.messages == [], "what cannot be registered, or let go, is told"


def test_steps_inputs_pass_a_load(caplog: pytest.LogCaptureFixture) -> None:
    """A small array is there while a delta is on its way, though each alone has the copy engine to itself."""
    device = torch.device("cuda")
    memory = read_only_mapping(bytes(4 * SIZE))
    uploads, target = Uploads(device), torch.zeros(4 * SIZE, dtype=torch.uint8, device=device)
    uploads.lock_pages(memory)
    values = np.arange(4096, dtype=np.int64)

    def load() -> None:
        with uploads.beside_steps(gently=True) as upload:
            for _ in range(8):
                upload.copy(target, _tensor(memory))

    waits = []
    with ThreadPoolExecutor(1) as thread:
        loading = thread.submit(load)
        while not loading.done():
            began = time.perf_counter()
            there = to_device(values, device)
            torch.cuda.current_stream().synchronize()
            waits.append(time.perf_counter() - began)
            assert there.tolist() == values.tolist()
        loading.result()
    assert max(waits[1:]) < 0.02, "the load takes 60 ms"


def _tensor(memory: HostMemory) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it may not be written
        return torch.frombuffer(memory.view, dtype=torch.uint8)
