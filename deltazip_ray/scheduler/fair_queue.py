"""The order of admission: weighted fair queueing between versions, with a bound on overtaking.

**Service** is counted in tokens: a prompt's when its request is admitted, the output's as they are sampled. Tokens
found in the prefix cache or computed again after a preemption are free. A version's **spent** service is its service
divided by its weight. This is start-time fair queueing (Goyal, Vin and Cheng, 1996), with outputs charged as they come
because their length is not known before (Sheng et al., OSDI 2024).

* **Tags.** When a request becomes the first of its version's queue it gets a tag: what the version has spent. A version
  without waiting requests collects no credit: its tag is at least the virtual time ``now``. No tag is more than
  ``lead`` above ``now``: older service is forgiven. The lowest tag is admitted; ``now`` is the highest tag admitted.
* **Priority.** Each step of priority lowers the tag by ``step`` tokens, and moves the request ``step`` tokens earlier
  in its version's queue, which is ordered by virtual time of arrival. So priorities age: a newcomer with a higher
  priority passes a waiting request only until ``now`` has advanced by ``step`` for each step between them.
* **Grouping.** One version, named by the scheduler, may continue while its tag is at most ``group`` above the lowest:
  few long segments run faster than many short ones.

**Bound.** From the time at which a request of version f becomes the first of its queue until it is admitted, any other
version g, of weight w, gets requests admitted with prompts of at most ::

    w * (lead + 2 * (group + step * d)) + L

tokens in total, where ``d`` is the largest difference of priorities and ``L`` is g's longest prompt, if ``L / w`` is at
most ``lead``. The service of f's own running requests does not matter. *Proof.* Let f get its tag at ``now = n``. The
tag does not change and is at most ``n + lead``. An admitted tag is at most ``group + step * d`` above that of every
other first request, as priorities shift both by at most ``step * d``. Since ``n`` was admitted, g's tag is at least
``n - group - step * d`` (at least ``n`` if g had nothing waiting); when g is admitted, its tag is at most
``n + lead + group + step * d``. In between, each admission advances it by at least prompt / w. The last one may exceed
the range by L / w. (If ``lead`` limits the tag, it is ``now + lead``, so not below f's, and g's next one is above.)
"""

import heapq
import math
from collections.abc import Iterator
from dataclasses import dataclass, field

from deltazip_ray.scheduler.sequence import SequenceState


@dataclass(slots=True, eq=False)
class _Flow:
    """One version."""

    weight: float
    spent: float
    tag: float = 0.0
    """Of the first request, without its priority."""
    waiting: list[tuple[tuple[float, int], SequenceState]] = field(default_factory=list)
    """A heap by ``SequenceState.order``."""

    @property
    def first(self) -> SequenceState | None:
        """The request whose turn it is in this version."""
        return self.waiting[0][1] if self.waiting else None


class FairQueue:
    """Requests that wait for admission."""

    def __init__(self, lead: float, step: float, group: float) -> None:
        """See the module's docstring; all in tokens, ``lead`` above 0."""
        self._lead = lead
        self._step = step
        self._group = group
        self._now = 0.0
        self._arrivals = 0
        self._length = 0
        self._flows: dict[str | None, _Flow] = {}

    def __len__(self) -> int:
        """Number of waiting requests."""
        return self._length

    def __iter__(self) -> Iterator[SequenceState]:
        """Waiting requests, in no particular order."""
        return (sequence for flow in self._flows.values() for _, sequence in flow.waiting)

    def add(self, sequence: SequenceState) -> None:
        """Queue a request; one that was queued before gets its old place within its version."""
        request = sequence.request
        if sequence.order is None:
            self._arrivals += 1
            sequence.order = (self._now - self._step * request.priority, self._arrivals)
        flow = self._flow(sequence)
        flow.weight = request.weight
        if not flow.waiting:
            flow.spent = max(flow.spent, self._now)
        before = flow.first
        heapq.heappush(flow.waiting, (sequence.order, sequence))
        self._length += 1
        self._retag(flow, before)

    def remove(self, sequence: SequenceState) -> None:
        """Remove a waiting request. Linear in its version's queue."""
        flow = self._flow(sequence)
        before = flow.first
        flow.waiting = [entry for entry in flow.waiting if entry[1] is not sequence]
        heapq.heapify(flow.waiting)
        self._length -= 1
        self._retag(flow, before)

    def first(self, grouped: SequenceState | None = None) -> SequenceState | None:
        """The request to admit next; None when none waits. ``grouped``: a request of the version that may continue."""
        least, best = math.inf, None
        for flow in self._flows.values():
            if flow.waiting and (tag := self._tag(flow)) < least:
                least, best = tag, flow
        if grouped is not None:
            preferred = self._flow(grouped)
            if preferred.waiting and self._tag(preferred) <= least + self._group:
                best = preferred
        return None if best is None else best.first

    def waits(self, sequence: SequenceState) -> bool:
        """Whether requests of the same version wait."""
        flow = self._flows.get(sequence.request.version)
        return flow is not None and bool(flow.waiting)

    def admit(self, sequence: SequenceState, tokens: int) -> None:
        """Remove a request that is ``first``, and charge its version for the ``tokens`` to be computed for it."""
        flow = self._flow(sequence)
        self._now = max(self._now, flow.tag)
        heapq.heappop(flow.waiting)
        self._length -= 1
        flow.spent += tokens / flow.weight
        self._retag(flow, sequence)
        self._flows = {version: f for version, f in self._flows.items() if f.waiting or f.spent > self._now}

    def charge(self, sequence: SequenceState, tokens: int) -> None:
        """Charge the version of a running request for output tokens."""
        flow = self._flow(sequence)
        flow.spent += tokens / flow.weight

    def _flow(self, sequence: SequenceState) -> _Flow:
        """The version's entry, created if there is none: idle versions that spent no more than ``now`` have none."""
        version = sequence.request.version
        flow = self._flows.get(version)
        if flow is None:
            flow = self._flows[version] = _Flow(sequence.request.weight, self._now)
        return flow

    def _tag(self, flow: _Flow) -> float:
        return flow.tag - self._step * flow.waiting[0][1].request.priority

    def _retag(self, flow: _Flow, before: SequenceState | None) -> None:
        """Give the first request a tag if it has just become the first."""
        if flow.waiting and flow.first is not before:
            flow.tag = flow.spent = min(flow.spent, self._now + self._lead)
