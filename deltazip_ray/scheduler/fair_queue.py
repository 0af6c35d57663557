"""Who is admitted next: weighted fair service between versions, with a bound on how long anybody is overtaken.

**Service** is counted in tokens: those of a prompt when its request is admitted, those of the output as they come.
Tokens that the prefix cache has, or that are computed again after a preemption, cost nothing. What a version has
**spent** is its service divided by its weight. This is start-time fair queueing (Goyal, Vin and Cheng, 1996), with
outputs charged when they come, as their length is not known before (Sheng et al., OSDI 2024).

* The first request of each version's queue gets a **tag** when it becomes the first: what the version has spent. Who
  had nobody waiting has no credit: it begins at the virtual time ``now`` at least. Nobody is more than ``lead`` above
  ``now``: older service is forgiven. The least tag is admitted; ``now`` is the greatest tag that ever was.
* **Priority.** Each step up in priority counts as ``step`` tokens less in the tag, and as arriving ``step`` tokens
  earlier in the version's queue, whose order is the virtual time of arrival. So it ages: a request that waits is passed
  by newcomers of higher priority only until ``now`` has moved on by ``step`` for each step between them.
* **Grouping.** One version, which the scheduler names, may go on while its tag is at most ``group`` above the least:
  few long segments run faster than many short ones.

**Bound.** From the moment on at which a request of version f becomes the first of its queue, until it is admitted, any
other version g, of weight w, gets requests admitted with prompts of at most ::

    w * (lead + 2 * (group + step * d)) + L

tokens, ``d`` being how much priorities differ and ``L`` g's longest prompt, if ``L / w`` is at most ``lead``. What f's
own running requests are served does not matter. *Proof.* Let f's tag be given at ``now = n``; it stays, and is at most
``n + lead``. A tag that is admitted is at most ``group + step * d`` above that of every other first request, as
priorities shift both by no more than ``step * d``. Since ``n`` was admitted, the tag of g is at least
``n - group - step * d`` (or at least ``n``, if g had nobody waiting); when g is admitted, its tag is at most
``n + lead + group + step * d``. Between these each admission moves it on by prompt / w, or by more. The last one may
go beyond by L / w. (Should the limit of ``lead`` hold the tag back, it is at ``now + lead``, thus not below f's, and
g's next one is above.)
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
    """Requests that wait for their turn."""

    def __init__(self, lead: float, step: float, group: float) -> None:
        """See above; all in tokens, and ``lead`` above 0."""
        self._lead = lead
        self._step = step
        self._group = group
        self._now = 0.0
        self._arrivals = 0
        self._length = 0
        self._flows: dict[str | None, _Flow] = {}

    def __len__(self) -> int:
        """Requests that wait."""
        return self._length

    def __iter__(self) -> Iterator[SequenceState]:
        """Requests that wait, in no order that matters."""
        return (sequence for flow in self._flows.values() for _, sequence in flow.waiting)

    def add(self, sequence: SequenceState) -> None:
        """Queue a request; one that was here before takes its old place among those of its version."""
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
        """Forget a request that waits. Linear in its version's queue."""
        flow = self._flow(sequence)
        before = flow.first
        flow.waiting = [entry for entry in flow.waiting if entry[1] is not sequence]
        heapq.heapify(flow.waiting)
        self._length -= 1
        self._retag(flow, before)

    def first(self, grouped: SequenceState | None = None) -> SequenceState | None:
        """Whose turn it is; None when nobody waits. ``grouped``: a request of the version that may go on."""
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
        """Whether requests of its version wait."""
        flow = self._flows.get(sequence.request.version)
        return flow is not None and bool(flow.waiting)

    def admit(self, sequence: SequenceState, tokens: int) -> None:
        """Take out one that is ``first``; its version pays for the ``tokens`` that are to be computed for it."""
        flow = self._flow(sequence)
        self._now = max(self._now, flow.tag)
        heapq.heappop(flow.waiting)
        self._length -= 1
        flow.spent += tokens / flow.weight
        self._retag(flow, sequence)
        self._flows = {version: f for version, f in self._flows.items() if f.waiting or f.spent > self._now}

    def charge(self, sequence: SequenceState, tokens: int) -> None:
        """Let the version of a running request pay for its output."""
        flow = self._flow(sequence)
        flow.spent += tokens / flow.weight

    def _flow(self, sequence: SequenceState) -> _Flow:
        """The version's entry; one that has spent no more than ``now`` and has nobody waiting needs none."""
        version = sequence.request.version
        flow = self._flows.get(version)
        if flow is None:
            flow = self._flows[version] = _Flow(sequence.request.weight, self._now)
        return flow

    def _tag(self, flow: _Flow) -> float:
        return flow.tag - self._step * flow.waiting[0][1].request.priority

    def _retag(self, flow: _Flow, before: SequenceState | None) -> None:
        """Give the first request its tag, unless it was the first before."""
        if flow.waiting and flow.first is not before:
            flow.tag = flow.spent = min(flow.spent, self._now + self._lead)
