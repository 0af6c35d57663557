"""Three ways to decide which requests come to the scheduler when there are more versions than slots.

Time is simulated: ``World`` runs the real scheduler with steps that take what a model says. The first way is the
project's, with its real slot table; the others are models of what else is done.
"""

import asyncio
import heapq
import itertools
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace

from deltazip_ray.config import EngineConfig
from deltazip_ray.residency.slot_entries import AskSlot, Pin
from deltazip_ray.residency.slot_table import SlotTable
from deltazip_ray.residency.tiers import Tier
from deltazip_ray.scheduler.batch import Batch, Drawn
from deltazip_ray.scheduler.request import GenerateRequest, TokenChunk
from deltazip_ray.scheduler.scheduler import Scheduler


@dataclass(frozen=True)
class Costs:
    """Seconds: about those of an 8B model with deltas of 2 bits on one H200."""

    step: float = 5.2e-3
    version: float = 0.5e-3
    """Of each version in a step, the base not counted."""
    row: float = 0.04e-3
    """Of each row beyond one for each request."""
    merge: float = 8e-3
    """Of each version with at least ``long`` rows in a step."""
    long: int = 256
    load: float = 0.1
    """From the host to a slot."""

    def of(self, batch: Batch) -> float:
        """Seconds of a step."""
        rows = Counter(chunk.slot for chunk in batch.chunks for _ in chunk.tokens)
        merges = sum(count >= self.long for count in rows.values())
        extra = batch.num_tokens - len(batch.chunks)
        return self.step + self.version * len(rows) + self.row * extra + self.merge * merges


@dataclass
class Served:
    """What became of one request, in seconds from the start."""

    request: GenerateRequest
    arrived: float
    first: float | None = None
    ended: float | None = None


class World:
    """The clock, the scheduler and all requests."""

    def __init__(self, config: EngineConfig, costs: Costs, arrivals: list[tuple[float, GenerateRequest]]) -> None:
        self.sched = Scheduler(config)
        self.costs = costs
        self.seats = config.max_running
        self.now = 0.0
        self.loads = 0
        self.preempted = 0
        self.steps = 0
        self.served = {request.request_id: Served(request, when) for when, request in arrivals}
        self.output: Counter[str] = Counter()
        self._arrivals = arrivals
        self._timers: list[tuple[float, int, Callable[[], None]]] = []
        self._ids = itertools.count()

    def at(self, when: float, action: Callable[[], None]) -> None:
        """Have something done at a time."""
        heapq.heappush(self._timers, (when, next(self._ids), action))

    async def run(self, front: "Front") -> None:
        """Until every request has ended."""
        for when, request in self._arrivals:
            self.at(when, lambda request=request: front.arrive(request))  # type: ignore[misc]
        while any(one.ended is None for one in self.served.values()) and (self._timers or self.sched.has_work):
            while self._timers and self._timers[0][0] <= self.now:
                heapq.heappop(self._timers)[2]()
            await front.fill()
            if self.sched.has_work:
                self._step(front)
            elif self._timers:
                self.now = max(self.now, self._timers[0][0])

    def _step(self, front: "Front") -> None:
        batch = self.sched.schedule()
        self.now += self.costs.of(batch)
        self.steps += 1
        self.sched.update(batch, Drawn([1] * len(batch.sampling_chunks)))
        ended = []
        for name, news in self.sched.take_news():
            if isinstance(news, TokenChunk):
                one = self.served[name]
                one.first = self.now if one.first is None else one.first
                self.output[name] += len(news.tokens)
                if news.finish_reason is not None:
                    one.ended = self.now
                    ended.append(one.request)
        for request in ended:
            front.end(request)


class Front(ABC):
    """Decides which requests come to the scheduler."""

    def __init__(self, world: World, slots: int) -> None:
        self.world = world
        self.slots = slots

    @abstractmethod
    def arrive(self, request: GenerateRequest) -> None:
        """A request is here."""

    @abstractmethod
    async def fill(self) -> None:
        """Give the scheduler what may run in the next step."""

    @abstractmethod
    def end(self, request: GenerateRequest) -> None:
        """A request has all of its tokens."""


class Project(Front):
    """A slot table with bounded overtaking, and a fair queue for those whose version is in a slot."""

    def __init__(self, world: World, slots: int) -> None:
        super().__init__(world, slots)
        self._table = SlotTable(slots)
        self._pins: dict[str, Pin] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def arrive(self, request: GenerateRequest) -> None:
        task = asyncio.ensure_future(self._pin(request))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def fill(self) -> None:
        for _ in range(12):  # what one task sets off is done by others in the next rounds of the loop
            await asyncio.sleep(0)

    def end(self, request: GenerateRequest) -> None:
        self._table.unpin(self._pins.pop(request.request_id))

    async def _pin(self, request: GenerateRequest) -> None:
        pin = await self._table.pin(str(request.version), self._load)
        self._pins[request.request_id] = pin
        self.world.sched.add(request, pin.slot)

    async def _load(self, ask_slot: AskSlot) -> Tier:
        await ask_slot()
        self.world.loads += 1
        loaded = asyncio.get_running_loop().create_future()
        self.world.at(self.world.now + self.world.costs.load, lambda: loaded.set_result(None))
        await loaded
        return "host"


class Line(Front):
    """First come, first served: a request whose version has no slot stops everybody behind it."""

    skips = False

    def __init__(self, world: World, slots: int) -> None:
        super().__init__(world, slots)
        self._line: list[GenerateRequest] = []
        self._place = {name: i for i, name in enumerate(world.served)}
        self._ready: dict[str, float] = {}
        """Versions in slots, and when their load is done."""
        self._slot: dict[str, int] = {}
        self._inside: dict[str, set[str]] = {}
        """Running requests by version."""
        self._parent: dict[str, str] = {}
        """By version: the request that brought it."""

    def arrive(self, request: GenerateRequest) -> None:
        self._line.append(request)

    async def fill(self) -> None:
        now, left = self.world.now, []
        seats = self.world.seats - sum(map(len, self._inside.values()))
        stopped = False
        for request in self._line:
            version = str(request.version)
            may = not stopped and seats > 0 and (version in self._ready or self._bring(request))
            if may and self._ready[version] <= now:
                seats -= 1
                self._inside[version].add(request.request_id)
                self.world.sched.add(request, self._slot[version])
            else:
                stopped = stopped or not self.skips
                left.append(request)
        self._line = left

    def end(self, request: GenerateRequest) -> None:
        version = str(request.version)
        self._inside[version].discard(request.request_id)

    def _bring(self, request: GenerateRequest) -> bool:
        """Take a slot for a request's version, if one is free or holds a version that nobody uses."""
        version = str(request.version)
        if len(self._ready) == self.slots:
            idle = [v for v, inside in self._inside.items() if not inside and self._ready[v] <= self.world.now]
            if not idle:
                return False
            slot = self._drop(idle[0])
        else:
            slot = len(self._ready)
        self.world.loads += 1
        self._slot[version] = slot
        self._inside[version] = set()
        self._ready[version] = self.world.now + self.world.costs.load
        self._parent[version] = request.request_id
        self.world.at(self._ready[version], lambda: None)
        return True

    def _drop(self, version: str) -> int:
        del self._ready[version], self._inside[version], self._parent[version]
        return self._slot.pop(version)


class SkipTheLine(Line):
    """DeltaZip's: requests pass those whose version has no slot, as long as the request runs that brought theirs.

    When that one ends, those that passed somebody still waiting are preempted and line up again where they were.
    """

    skips = True

    def end(self, request: GenerateRequest) -> None:
        super().end(request)
        version = str(request.version)
        if self._parent.get(version) != request.request_id:
            return
        waiting = [self._place[r.request_id] for r in self._line if str(r.version) not in self._ready]
        first = min(waiting, default=len(self._place))
        inside = [name for name in self._inside[version] if self.world.served[name].ended is None]
        inside.sort(key=self._place.__getitem__)
        passed = [name for name in inside if self._place[name] > first]
        for name in passed:
            self._preempt(name, version)
        stay = [name for name in inside if self._place[name] < first]
        if stay:
            self._parent[version] = stay[0]
        elif not passed:
            self._parent[version] = ""

    def _preempt(self, name: str, version: str) -> None:
        world, old = self.world, self.world.served[name].request
        world.sched.abort(name)
        world.sched.take_news()
        world.preempted += 1
        self._inside[version].discard(name)
        made = world.output[name]
        self._line.append(replace(old, prompt=old.prompt + (1,) * made, output_offset=made))
        self._line.sort(key=lambda request: self._place[request.request_id])
