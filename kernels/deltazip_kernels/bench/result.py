"""What a measurement is."""

from dataclasses import asdict, dataclass
from statistics import median
from typing import Any


@dataclass(frozen=True)
class Result:
    """One measurement. ``bytes`` are those of the deltas that the launch reads; samples are seconds a launch, and
    ``reference`` is what to compare them with."""

    kind: str
    codec: str
    linear: str
    segments: str
    rows: int
    bytes: int
    samples: list[float]
    reference: float | None = None

    @property
    def seconds(self) -> float:
        return median(self.samples)

    def record(self, bandwidth: float) -> dict[str, Any]:
        """As JSON, with the share of ``bandwidth`` (bytes a second)."""
        share = self.bytes / self.seconds / bandwidth
        return asdict(self) | {"seconds": self.seconds, "share_of_copy_bandwidth": share}
