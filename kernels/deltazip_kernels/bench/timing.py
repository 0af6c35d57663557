"""Times on a GPU: graph replays over inputs that no cache holds, and the machine's own limits in the same run."""

from collections.abc import Callable, Mapping, Sequence
from statistics import median
from time import perf_counter

import torch

REPEATS = 9
COPY_BYTES = 4 << 30
Launch = Callable[[], object]


def graph_times(launches: Sequence[Launch], repeats: int = REPEATS) -> list[float]:
    """Seconds a launch, one sample for each of ``repeats`` replays of a CUDA graph of all ``launches``.

    Give launches that read different inputs, together several times the L2, and each finds its input in memory.
    """
    graph = _graph(launches)
    return [seconds / len(launches) for seconds in _event_times(graph.replay, repeats)]


def times_in_turns(ways: Mapping[str, Sequence[Launch]], seconds: float) -> dict[str, list[float]]:
    """The same for each of several ways, in turns for ``seconds``, without those of the first third.

    A GPU's clock follows its load: what is compared has to be measured together, on one that has been busy for a while,
    and not always behind the same other: every other round goes backwards.
    """
    graphs = {name: _graph(launches) for name, launches in ways.items()}
    times: dict[str, list[float]] = {name: [] for name in ways}
    order = list(ways)
    end = perf_counter() + seconds
    while perf_counter() < end or len(times[order[0]]) < REPEATS:
        order.reverse()
        events = {name: _record(graphs[name].replay) for name in order}
        torch.cuda.synchronize()
        for name, (first, last) in events.items():
            times[name].append(first.elapsed_time(last) / 1e3 / len(ways[name]))
    return {name: samples[len(samples) // 3 :] for name, samples in times.items()}


def copy_bandwidth() -> float:
    """Bytes per second that a device-to-device copy reads and writes, together."""
    source = torch.randint(0, 256, (COPY_BYTES,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    target.copy_(source)
    return 2 * COPY_BYTES / median(_event_times(lambda: target.copy_(source), REPEATS))


def _graph(launches: Sequence[Launch]) -> torch.cuda.CUDAGraph:
    for launch in launches:
        launch()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for launch in launches:
            launch()
    graph.replay()
    return graph


def _event_times(run: Callable[[], object], repeats: int) -> list[float]:
    times = []
    for _ in range(repeats):
        start, end = _record(run)
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return times


def _record(run: Callable[[], object]) -> tuple[torch.cuda.Event, torch.cuda.Event]:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    run()
    end.record()
    return start, end
