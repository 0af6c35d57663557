"""For all tests that start Ray."""

import secrets
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session", autouse=True)
def ray_token() -> Iterator[None]:
    """One token for all clusters: a process keeps the first it sees, and the next cluster would refuse it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
        yield
