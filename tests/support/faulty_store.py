"""A store in a folder whose reads go wrong as a test asks."""

import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from deltazip_ray.artifact.file_store import FileStore
from deltazip_ray.artifact.object_store import MAX_OBJECT, Pieces
from deltazip_ray.errors import BlobCorrupt, ObjectNotFound, StoreUnavailable

Kind = Literal["unavailable", "wrong bytes", "truncated", "absent"]


@dataclass
class Fault:
    """What happens to the next ``times`` reads of keys that contain ``match``."""

    kind: Kind
    match: str = ""
    times: int = 1_000_000


class FaultyStore(FileStore):
    """Reads are counted, take ``latency_s``, wait while ``gate`` is clear, and suffer ``faults``. Writes are sound."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.faults: list[Fault] = []
        self.reads: list[str] = []
        self.latency_s = 0.0
        self.gate = threading.Event()
        self.gate.set()
        self.reading = 0
        """Reads under way."""
        self.most_reading = 0
        self._lock = threading.Lock()

    def get(self, key: str, limit: int = MAX_OBJECT) -> bytes:
        kind = self._begin(key)
        try:
            data = super().get(key, limit)
        finally:
            self._end()
        if kind == "wrong bytes":
            return bytes([data[0] ^ 1]) + data[1:]
        return data[:-1] if kind == "truncated" else data

    def pieces(self, key: str, buffer: memoryview) -> Pieces:
        kind = self._begin(key)
        try:
            if kind == "truncated":
                half = len(buffer) // 2
                buffer[:half] = super().get(key)[:half]
                raise BlobCorrupt(f"{key} has {half} bytes, not {len(buffer)}: publish it again")
            for _ in super().pieces(key, buffer):
                pass
            if kind == "wrong bytes":
                buffer[len(buffer) // 2] ^= 1
            yield buffer
        finally:
            self._end()

    def count(self, match: str) -> int:
        """Reads of keys that contain ``match``."""
        return sum(match in key for key in self.reads)

    def _begin(self, key: str) -> Kind | None:
        with self._lock:
            self.reads.append(key)
            self.reading += 1
            self.most_reading = max(self.most_reading, self.reading)
            fault = next((f for f in self.faults if f.times and f.match in key), None)
            if fault is not None:
                fault.times -= 1
        kind = fault.kind if fault is not None else None
        time.sleep(self.latency_s)
        if not self.gate.wait(30):
            raise TimeoutError("the test never opened the gate")
        if kind in ("unavailable", "absent"):
            self._end()
        if kind == "unavailable":
            raise StoreUnavailable(f"{self.url} does not answer: try again later")
        if kind == "absent":
            raise ObjectNotFound(f"{self.url} has no {key}")
        return kind

    def _end(self) -> None:
        with self._lock:
            self.reading -= 1
