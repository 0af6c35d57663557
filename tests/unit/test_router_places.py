"""A router's places: however many variants flood it, another one finds room."""

from contextlib import ExitStack, suppress

import pytest

from deltazip_deployments.router.places import Places
from deltazip_ray.errors import Overloaded


@pytest.mark.parametrize("floods", [1, 2, 3, 7])
def test_floods_get_equal_shares_and_leave_room(floods: int) -> None:
    places, taken = Places(210), dict.fromkeys(map(str, range(floods)), 0)
    with ExitStack() as held:
        for _ in range(300):
            for variant in taken:
                with suppress(Overloaded):
                    held.enter_context(places.taken(variant, 1))
                    taken[variant] += 1
        assert set(taken.values()) <= {420 // (1 + 2 * floods), 420 // (1 + 2 * floods) + 1}
        with places.taken("another", 1):
            pass
    with ExitStack() as held:
        for _ in range(140):
            held.enter_context(places.taken("0", 1))


def test_a_request_for_many_outputs_takes_many_places() -> None:
    places = Places(90)
    with ExitStack() as held:
        for _ in range(2):
            held.enter_context(places.taken("flood", 32))
        with pytest.raises(Overloaded, match="64 outputs"), places.taken("flood", 1):
            pass
        with places.taken("another", 26):
            pass
    with places.taken("flood", 32), places.taken("flood", 32):
        pass
