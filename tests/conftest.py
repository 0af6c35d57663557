"""Fixtures for all tests."""

import os
import secrets
from collections.abc import Iterator

import pytest
import torch

if not torch.cuda.is_available():
    # Read when a kernel is defined, triton's own among them: so before anybody imports triton.
    os.environ["TRITON_INTERPRET"] = "1"

pytest_plugins = ("tests.support.s3",)


@pytest.fixture(scope="session", autouse=True)
def ray_token() -> Iterator[None]:
    """One token for all clusters: a process keeps the first it sees, and the next cluster would refuse it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
        yield
