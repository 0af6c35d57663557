"""Kernels are put on the device one at a time, whoever has them compiled."""

import time
from concurrent.futures import ThreadPoolExecutor
from threading import Lock

from deltazip_kernels import launch


class Kernel:
    inside = Lock()

    @property
    def run(self) -> None:
        assert self.inside.acquire(blocking=False), "another thread imports what launches its kernel"
        time.sleep(0.001)
        self.inside.release()


def test_two_threads_do_not_load_at_once() -> None:
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(launch._load, [Kernel() for _ in range(32)]))
