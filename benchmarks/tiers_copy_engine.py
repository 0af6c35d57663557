"""``python -m benchmarks.tiers_copy_engine --json FILE``: how long a step's small copy waits for a delta's chunks.

A thread copies from page-locked memory to the device in chunks of which some are under way, without end; meanwhile 32
KiB are copied on another stream, from pageable and from page-locked memory. Also how long the host is held by such
copies when their stream has work to do.
"""

import argparse
import json
import threading
import time
from pathlib import Path
from typing import Any

import torch

MIB = 1 << 20
SIZE = 1024 * MIB
SMALL = 32 << 10


class Bulk:
    """Copies chunks until it is told to end."""

    def __init__(self, chunk: int, depth: int) -> None:
        self.source = torch.empty(SIZE, dtype=torch.uint8, pin_memory=True)
        self.target = torch.empty(SIZE, dtype=torch.uint8, device="cuda")
        self.chunk, self.depth = chunk, depth
        self.ended = threading.Event()
        self.copied = 0
        self.core = 0.0
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> "Bulk":
        self._thread.start()
        self._began = time.perf_counter()
        time.sleep(0.03)
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self._thread.join()
        self.seconds = time.perf_counter() - self._began

    def _run(self) -> None:
        events = [torch.cuda.Event(blocking=True) for _ in range(self.depth)]
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            count = 0
            while not self.ended.is_set():
                event = events[count % self.depth]
                if count >= self.depth:
                    event.synchronize()
                start = count * self.chunk % SIZE
                part = slice(start, start + self.chunk)
                self.target[part].copy_(self.source[part], non_blocking=True)
                event.record(stream)
                count += 1
        stream.synchronize()
        self.copied, self.core = count * self.chunk, time.thread_time()


def waits(host: torch.Tensor, copies: int = 40, limit_s: float = 0.25) -> dict[str, float]:
    """Microseconds that small copies take on the device, one after the other."""
    target = torch.empty_like(host, device="cuda")
    found: list[float] = []
    end = time.perf_counter() + limit_s
    while len(found) < copies and time.perf_counter() < end:
        before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        before.record()
        target.copy_(host, non_blocking=True)
        after.record()
        after.synchronize()
        found.append(1e3 * before.elapsed_time(after))
        time.sleep(0.0005)
    found.sort()
    return {"p50": found[len(found) // 2], "max": found[-1], "copies": len(found)}


def beside(chunk: int, depth: int, pageable: torch.Tensor, locked: torch.Tensor) -> dict[str, Any]:
    """One way of bulk copies, and what small ones make of it."""
    with Bulk(chunk * MIB, depth) as bulk:
        found = {"pageable_us": waits(pageable), "page_locked_us": waits(locked)}
    torch.cuda.synchronize()
    speed = bulk.copied / bulk.seconds / 1e9
    return {"chunk_MiB": chunk, "depth": depth, **found, "GB_per_s": speed, "core": bulk.core / bulk.seconds}


def behind_work(kib: int) -> dict[str, float]:
    """Microseconds of the host for a copy whose stream has milliseconds of work to do."""
    work = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    pageable = torch.zeros(kib << 10, dtype=torch.uint8)
    target, row = torch.empty_like(pageable, device="cuda"), {"KiB": float(kib)}
    for name, host in (("pageable_host_us", pageable), ("page_locked_host_us", pageable.pin_memory())):
        samples = []
        for _ in range(4):
            torch.cuda.synchronize()
            for _ in range(6):
                work @ work
            began = time.perf_counter()
            target.copy_(host, non_blocking=True)
            samples.append(1e6 * (time.perf_counter() - began))
        row[name] = min(samples[1:])
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--commit", default="", help="of this tree")
    options = parser.parse_args()
    pageable = torch.zeros(SMALL, dtype=torch.uint8)
    locked = pageable.pin_memory()
    ways = [(1, 1), (2, 1), (4, 1), (8, 1), (1, 8), (4, 2), (4, 4), (16, 2)]
    result = {
        "machine": torch.cuda.get_device_name(),
        "commit": options.commit,
        "small_copy_KiB": SMALL >> 10,
        "behind_work": [behind_work(kib) for kib in (1, 8, 32, 64, 128, 512)],
        "beside_bulk": [beside(chunk, depth, pageable, locked) for chunk, depth in ways],
    }
    options.json.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
