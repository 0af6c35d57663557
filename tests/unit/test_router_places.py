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
                    held.enter_context(places.one(variant))
                    taken[variant] += 1
        assert set(taken.values()) <= {420 // (1 + 2 * floods), 420 // (1 + 2 * floods) + 1}
        with places.one("another"):
            pass
    with ExitStack() as held:
        for _ in range(140):
            held.enter_context(places.one("0"))
