"""Breakers and quarantine: when a failure is repeated without a try, and when it is tried again."""

import random
import traceback

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deltazip_ray.artifact.manifest import BlobEntry
from deltazip_ray.config import BreakerConfig
from deltazip_ray.errors import (
    ArtifactError,
    BlobCorrupt,
    DeltaZipError,
    InvalidName,
    ManifestInvalid,
    ObjectNotFound,
    StoreError,
    StoreFull,
    StoreUnavailable,
)
from deltazip_ray.residency.breakers import Breakers
from deltazip_ray.residency.quarantine import Quarantine, blob_key
from tests.support.plain_versions import make_manifest


class Bench:
    """Breakers with a clock that a test moves; without jitter unless it asks for some."""

    def __init__(self, failures: int = 3, backoff_s: float = 1.0, longest_s: float = 8.0, chance: float = 0.0) -> None:
        self.now = 100.0
        config = BreakerConfig(failures=failures, backoff_s=backoff_s, backoff_max_s=longest_s)
        self.breakers = Breakers(config, lambda: self.now, lambda: chance)
        self.tries = 0

    def attempt(self, error: BaseException | None = None, version: str = "v") -> BaseException | None:
        """One try that ends with ``error``; returns what the caller gets."""
        try:
            with self.breakers.guard(version):
                self.tries += 1
                self.now += 0.001
                if error is not None:
                    raise error
        except (DeltaZipError, KeyboardInterrupt) as raised:
            return raised
        return None

    def fail(self, times: int, error: type[DeltaZipError] = StoreUnavailable) -> None:
        for _ in range(times):
            self.attempt(error("no answer"))


def test_it_takes_some_failures_in_a_row() -> None:
    bench = Bench(failures=3)
    bench.fail(2)
    assert bench.attempt() is None
    bench.fail(2)
    assert bench.breakers.open == 0
    bench.fail(1)
    assert bench.breakers.open == 1
    tries = bench.tries
    assert isinstance(bench.attempt(), StoreUnavailable)
    assert (bench.tries, bench.breakers.refusals) == (tries, 1)


@pytest.mark.parametrize(("asked_s", "back_off_s"), [(5.0, 5.0), (0.1, 1.0), (100.0, 8.0)])
def test_a_store_that_asks_for_a_pause_gets_it_within_the_bound(asked_s: float, back_off_s: float) -> None:
    bench = Bench(failures=1, backoff_s=1.0, longest_s=8.0)
    busy = StoreUnavailable("slow down")
    busy.retry_after_s = asked_s
    bench.attempt(busy)
    refusal = bench.attempt()
    assert isinstance(refusal, StoreUnavailable)
    assert refusal.retry_after_s == pytest.approx(back_off_s, abs=0.01)


def test_the_reason_is_in_the_log_when_it_begins_and_when_it_is_repeated(caplog: pytest.LogCaptureFixture) -> None:
    bench = Bench(failures=3)
    bench.fail(3)
    bench.attempt()
    bench.now += 60
    bench.fail(1)
    assert [record.getMessage() for record in caplog.records] == [
        "version v has failed 1 times: no answer",
        "version v has failed 3 times: no answer",
    ]


def test_others_are_not_affected() -> None:
    bench = Bench(failures=1)
    bench.fail(1)
    assert bench.attempt(version="other") is None


@pytest.mark.parametrize("kind", [BlobCorrupt, ManifestInvalid])
def test_a_broken_version_is_answered_with_its_error_as_it_was(kind: type[ArtifactError]) -> None:
    bench = Bench(failures=1)
    bench.attempt(kind("digest of layers.3"))
    answer = bench.attempt()
    assert type(answer) is kind
    assert str(answer) == "digest of layers.3"


@pytest.mark.parametrize("kind", [StoreUnavailable, ObjectNotFound])
def test_a_store_that_fails_is_answered_with_the_time_of_the_next_try(kind: type[StoreError]) -> None:
    bench = Bench(failures=2, backoff_s=4)
    bench.fail(2, kind)
    bench.now += 1
    answer = bench.attempt()
    assert type(answer) is kind
    assert isinstance(answer, StoreError)
    assert answer.retry_after_s == pytest.approx(3)
    assert str(answer) == "no answer (failed 2 times in a row, next try in 3.0 s)"


def test_the_pause_doubles_up_to_a_bound_and_ends_with_a_success() -> None:
    bench = Bench(failures=1, backoff_s=1, longest_s=5)
    for tries, pause_s in enumerate((1, 2, 4, 5, 5), start=1):
        bench.fail(1)
        bench.now += pause_s - 0.01
        assert bench.attempt() is not None
        assert bench.tries == tries
        bench.now += 0.02
    assert bench.attempt() is None
    assert bench.breakers.open == 0
    bench.fail(1)
    bench.now += 1.01
    assert bench.attempt() is None, "the pause is short again"


@pytest.mark.parametrize(("chance", "pause_s"), [(0.0, 4.0), (0.5, 3.0), (1.0, 2.0)])
def test_jitter_shortens_the_pause(chance: float, pause_s: float) -> None:
    bench = Bench(failures=1, backoff_s=4, chance=chance)
    bench.fail(1)
    answer = bench.attempt()
    assert isinstance(answer, StoreError)
    assert answer.retry_after_s == pytest.approx(pause_s)


def test_one_probe_at_a_time() -> None:
    bench = Bench(failures=1, backoff_s=1)
    bench.fail(1)
    bench.now += 2
    with bench.breakers.guard("v"):
        assert isinstance(bench.attempt(), StoreUnavailable)
        assert isinstance(bench.attempt(), StoreUnavailable)
    assert bench.attempt() is None
    assert bench.breakers.open == 0


@pytest.mark.parametrize("leaves", [KeyboardInterrupt(), StoreFull("the arena is full"), InvalidName("..")])
def test_a_probe_that_ends_without_a_verdict_lets_the_next_one_try(leaves: BaseException) -> None:
    bench = Bench(failures=1, backoff_s=1)
    bench.fail(1)
    bench.now += 2
    assert bench.attempt(leaves) is leaves
    assert bench.breakers.open == 1
    assert bench.attempt() is None


@pytest.mark.parametrize("error", [KeyboardInterrupt(), StoreFull("the arena is full"), InvalidName("..")])
def test_what_is_not_the_versions_fault_does_not_count(error: BaseException) -> None:
    bench = Bench(failures=1)
    assert bench.attempt(error) is error
    assert bench.attempt() is None


def test_all_who_waited_for_one_failure_have_failed_once() -> None:
    bench = Bench(failures=2)
    guards = [bench.breakers.guard("v") for _ in range(5)]
    for guard in guards:
        guard.__enter__()
    error = StoreUnavailable("no answer")
    for guard in guards:
        bench.now += 0.001
        assert not guard.__exit__(type(error), error, None)
    assert bench.attempt() is None


def test_an_error_that_is_given_many_times_does_not_grow() -> None:
    bench = Bench(failures=1)
    bench.fail(1)
    answers = [bench.attempt() for _ in range(50)]
    assert len({id(answer) for answer in answers}) == 50
    assert len({len(traceback.extract_tb(answer.__traceback__)) for answer in answers if answer}) == 1


def test_names_without_end_do_not_fill_the_memory() -> None:
    bench = Bench(failures=1)
    for index in range(5000):
        bench.attempt(ObjectNotFound("none"), version=str(index))
    assert bench.breakers.open == 4096
    assert isinstance(bench.attempt(version="4999"), ObjectNotFound)
    assert bench.attempt(version="0") is None


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_a_version_is_tried_when_and_only_when_its_time_has_come(data: st.DataObject) -> None:
    """Against a model: the failures in a row, and the earliest and latest moment of the next try."""
    seed, failures = data.draw(st.integers(0, 1 << 16)), data.draw(st.integers(1, 4))
    config = BreakerConfig(failures=failures, backoff_s=1, backoff_max_s=8)
    now, in_a_row, since = 0.0, 0, 0.0
    breakers = Breakers(config, lambda: now, random.Random(seed).random)
    for pause_s, good in data.draw(st.lists(st.tuples(st.floats(0.001, 6), st.booleans()), max_size=40)):
        now += pause_s
        tried, refused = False, False
        try:
            with breakers.guard("v"):
                tried = True
                if not good:
                    raise BlobCorrupt("bad")
        except BlobCorrupt:
            refused = not tried
        longest = min(8.0, 2.0 ** (in_a_row - failures)) if in_a_row >= failures else 0.0
        assert tried or now - since < longest, "it may be tried now at the latest"
        assert refused or now - since >= longest / 2, "it may not be tried yet"
        if tried:
            in_a_row, since = 0 if good else in_a_row + 1, now
        assert breakers.open == (in_a_row >= failures)


def entry(fill: str, short: int = 0) -> BlobEntry:
    made = make_manifest({"outer": fill.encode() * 100}).blobs[0]
    return made.model_copy(update={"size": made.size - short})


def test_quarantine_names_the_blob_and_ends() -> None:
    now = 0.0
    quarantine = Quarantine(60, lambda: now)
    good, bad = entry("a"), entry("b")
    quarantine.refuse([good, bad])
    quarantine.add(blob_key(bad))
    now = 59.0
    quarantine.refuse([good, entry("b", short=1)])
    with pytest.raises(BlobCorrupt, match=f"{bad.digest} arrived damaged twice and is not fetched for another 1 s"):
        quarantine.refuse([good, bad])
    assert (len(quarantine), quarantine.admissions) == (1, 1)
    now = 60.0
    quarantine.refuse([good, bad])
    assert len(quarantine) == 0


def test_quarantine_begins_anew_with_each_failure_and_forgets_what_is_over() -> None:
    now = 0.0
    quarantine = Quarantine(10, lambda: now)
    for index in range(100):
        now = float(index)
        quarantine.add((f"{index:064}", 1))
    assert len(quarantine._until) == len(quarantine) == 10
    bad = entry("b")
    now = 200.0
    quarantine.add(blob_key(bad))
    now = 205.0
    quarantine.add(blob_key(bad))
    now = 212.0
    with pytest.raises(BlobCorrupt):
        quarantine.refuse([bad])
