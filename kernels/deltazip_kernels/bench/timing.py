"""Times on a GPU: graph replays over inputs that no cache holds, and the machine's own limits in the same run."""

from collections.abc import Callable, Sequence
from statistics import median

import torch

REPEATS = 9
COPY_BYTES = 4 << 30
Launch = Callable[[], object]


def graph_times(launches: Sequence[Launch], repeats: int = REPEATS) -> list[float]:
    """Seconds a launch, one sample for each of ``repeats`` replays of a CUDA graph of all ``launches``.

    Give launches that read different inputs, together several times the L2, and each finds its input in memory.
    """
    for launch in launches:
        launch()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for launch in launches:
            launch()
    graph.replay()
    return [seconds / len(launches) for seconds in _event_times(graph.replay, repeats)]


def copy_bandwidth() -> float:
    """Bytes per second that a device-to-device copy reads and writes, together."""
    source = torch.randint(0, 256, (COPY_BYTES,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    target.copy_(source)
    return 2 * COPY_BYTES / median(_event_times(lambda: target.copy_(source), REPEATS))


def _event_times(run: Callable[[], object], repeats: int) -> list[float]:
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return times
