"""Who is admitted next: shares by weight, the bound on overtaking, priorities that age, grouping by version."""

import random
from collections import Counter, defaultdict
from collections.abc import Callable
from operator import methodcaller

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deltazip_ray.scheduler.fair_queue import FairQueue
from deltazip_ray.scheduler.request import GenerateRequest
from deltazip_ray.scheduler.sequence import SequenceState

LEAD, STEP, GROUP = 120.0, 30.0, 40.0
WEIGHTS = {"a": 1.0, "b": 1.0, "c": 2.5, "d": 0.5}
LONGEST = 50
PRIORITIES = range(-2, 3)


def sequence(version: str, tokens: int, priority: int = 0, weight: float | None = None) -> SequenceState:
    weight = WEIGHTS[version] if weight is None else weight
    return SequenceState(GenerateRequest("r", version, (1,) * tokens, priority=priority, weight=weight), 0)


versions = st.sampled_from(sorted(WEIGHTS))
operations = st.one_of(
    st.builds(methodcaller, st.just("add"), versions, st.integers(1, LONGEST), st.sampled_from(PRIORITIES)),
    st.builds(methodcaller, st.just("admit"), grouped=st.booleans()),
    st.builds(methodcaller, st.just("charge"), versions, st.integers(1, 200)),
    st.builds(methodcaller, st.just("remove"), st.integers(0, 30)),
)


class Counted:
    """A queue, and what each version got while another one's first request has been waiting."""

    def __init__(self) -> None:
        self.queue = FairQueue(LEAD, STEP, GROUP)
        self.waiting: list[SequenceState] = []
        self.last: SequenceState | None = None
        self.firsts: dict[str, SequenceState] = {}
        self.overtaken: dict[str, Counter[str]] = defaultdict(Counter)
        self.closest = 0.0
        """The greatest part of the bound that was reached."""

    def add(self, version: str, tokens: int, priority: int) -> None:
        self.waiting.append(sequence(version, tokens, priority))
        self.queue.add(self.waiting[-1])

    def charge(self, version: str, tokens: int) -> None:
        self.queue.charge(sequence(version, 1), tokens)

    def remove(self, index: int) -> None:
        if self.waiting:
            self.queue.remove(self.waiting.pop(index % len(self.waiting)))

    def admit(self, *, grouped: bool) -> None:
        admitted = self.queue.first(self.last if grouped else None)
        assert (admitted is None) == (not self.waiting)
        if admitted is None:
            return
        version, tokens = str(admitted.request.version), len(admitted)
        assert admitted is self.firsts[version]
        self.queue.admit(admitted, tokens)
        self.waiting.remove(admitted)
        self.last = admitted
        spread = max(PRIORITIES) - min(PRIORITIES)
        for other in self.firsts.keys() - {version}:
            self.overtaken[other][version] += tokens
            bound = WEIGHTS[version] * (LEAD + 2 * (GROUP + STEP * spread)) + LONGEST
            assert self.overtaken[other][version] <= bound
            self.closest = max(self.closest, self.overtaken[other][version] / bound)

    def look(self) -> None:
        """Begin to count anew where another request is the first of its version."""
        for version in WEIGHTS:
            mine = [s for s in self.waiting if s.request.version == version]
            first = min(mine, key=lambda s: s.order or (0.0, 0), default=None)
            if first is not self.firsts.get(version):
                self.overtaken[version].clear()
                self.firsts.pop(version, None)
                if first is not None:
                    self.firsts[version] = first


@settings(max_examples=500, deadline=None)
@given(st.lists(operations, max_size=120))
def test_no_version_gets_more_before_anothers_first_request_than_the_bound(
    plan: list[Callable[[Counted], None]],
) -> None:
    counted = Counted()
    for operation in plan:
        operation(counted)
        counted.look()
        assert len(counted.queue) == len(counted.waiting) == sum(1 for _ in counted.queue)


@pytest.mark.parametrize("seed", range(4))
def test_the_bound_holds_with_long_queues(seed: int) -> None:
    dice = random.Random(seed)
    counted = Counted()
    for i in range(4000):
        kind = dice.random()
        if kind < 0.5 and len(counted.waiting) < 60:
            counted.add(dice.choice("aaaabcd"), dice.randint(1, LONGEST), dice.choice(PRIORITIES))
        elif kind < 0.55:
            counted.charge("d" if i % 400 < 40 else dice.choice("abc"), dice.randint(1, 200))
        elif kind < 0.57:
            counted.remove(dice.randint(0, 60))
        else:
            counted.admit(grouped=dice.random() < 0.8)
        counted.look()
    assert counted.closest > 0.4


def serve(queue: FairQueue, backlog: dict[str, Callable[[], SequenceState]], tokens: int) -> Counter[str]:
    """Admit until ``tokens`` were served, with each version always having two requests waiting."""
    served: Counter[str] = Counter()
    for make in backlog.values():
        queue.add(make())
        queue.add(make())
    while served.total() < tokens:
        admitted = queue.first()
        assert admitted is not None
        version = str(admitted.request.version)
        queue.admit(admitted, len(admitted))
        served[version] += len(admitted)
        queue.add(backlog[version]())
    return served


def test_versions_with_requests_waiting_are_served_by_weight_whatever_the_length_of_their_requests() -> None:
    queue = FairQueue(10_000, 0, 0)
    served = serve(
        queue,
        {"a": lambda: sequence("a", 7), "b": lambda: sequence("b", 400), "c": lambda: sequence("c", 30)},
        tokens=90_000,
    )
    assert served["a"] == pytest.approx(20_000, abs=1000)
    assert served["b"] == pytest.approx(20_000, abs=1000)
    assert served["c"] == pytest.approx(50_000, abs=1000)


def test_a_request_that_waits_keeps_its_place_whatever_its_version_is_served_meanwhile() -> None:
    queue = FairQueue(1000, 0, 0)
    first = sequence("a", 10)
    queue.add(first)
    queue.charge(sequence("a", 1), 500)
    queue.add(sequence("a", 10))
    queue.charge(sequence("b", 1), 100)
    queue.add(sequence("b", 10))
    assert queue.first() is first


def test_outputs_count_as_well_as_prompts() -> None:
    queue = FairQueue(10_000, 0, 0)
    served: Counter[str] = Counter()
    for _ in range(300):
        queue.add(sequence("a", 10))
        queue.add(sequence("b", 10))
    for _ in range(300):
        admitted = queue.first()
        assert admitted is not None
        queue.admit(admitted, 10)
        served[str(admitted.request.version)] += 1
        if admitted.request.version == "b":
            queue.charge(admitted, 20)
    assert served["a"] == pytest.approx(225, abs=2)


def test_who_was_idle_is_next_but_has_no_credit() -> None:
    queue = FairQueue(10_000, 0, 0)
    for _ in range(100):
        queue.add(sequence("a", 10))
    for _ in range(50):
        admitted = queue.first()
        assert admitted is not None
        queue.admit(admitted, 10)
    for _ in range(50):
        queue.add(sequence("b", 10))
    order = []
    for _ in range(20):
        admitted = queue.first()
        assert admitted is not None
        queue.admit(admitted, 10)
        order.append(admitted.request.version)
    assert order[0] == "b"
    assert Counter(order) == {"a": 10, "b": 10}


def test_priority_goes_first_until_it_ages() -> None:
    queue = FairQueue(10_000, 100, 0)
    old = sequence("a", 10)
    queue.add(old)
    passed = 0
    while True:
        urgent = sequence("a", 10, priority=1)
        queue.add(urgent)
        first = queue.first()
        assert first is not None
        queue.admit(first, 10)
        if first is old:
            break
        passed += 1
    assert 9 <= passed <= 12, "100 tokens of service are ten requests"


def test_one_that_is_queued_again_has_its_old_place() -> None:
    queue = FairQueue(10_000, 100, 0)
    old, other = sequence("a", 10), sequence("a", 10)
    queue.add(old)
    queue.admit(old, 10)
    queue.add(other)
    queue.add(old)
    assert queue.first() is old


def test_a_version_that_is_being_prefilled_goes_on_within_the_allowance() -> None:
    queue = FairQueue(10_000, 0, 35)
    for _ in range(8):
        queue.add(sequence("a", 10))
        queue.add(sequence("b", 10))
    order, last = [], None
    for _ in range(16):
        last = queue.first(last)
        assert last is not None
        queue.admit(last, 10)
        order.append(str(last.request.version))
    assert "".join(order) == "aaaabbbbbbbbaaaa"


@pytest.mark.parametrize("waiting", [0, 1])
def test_versions_that_have_nothing_to_remember_are_forgotten(waiting: int) -> None:
    queue = FairQueue(100, 0, 0)
    for i in range(50):
        one = SequenceState(GenerateRequest("r", f"v{i}", (1,)), 0)
        queue.add(one)
        queue.admit(one, 1)
    for _ in range(waiting):
        queue.add(sequence("a", 1))
    assert len(queue._flows) <= 50 + waiting
    for _ in range(60):
        one = sequence("b", 10)
        queue.add(one)
        queue.admit(one, 10)
    assert queue._flows.keys() <= {"a", "b"}
