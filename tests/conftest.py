"""Fixtures for all tests."""

import os

if "PYTEST_XDIST_WORKER" in os.environ:
    # Before torch is imported. There is a process a core: torch's further threads would only spin, waiting for theirs.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import secrets
import signal
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    # Read when a kernel is defined, triton's own among them: so before anybody imports triton.
    os.environ["TRITON_INTERPRET"] = "1"

    from triton.runtime import interpreter

    def _all_ones(_: Any, dtype: Any) -> Any:
        """As in Triton 3.9: the interpreter of 3.7, which torch 2.13 asks for, inverts no uint8 with NumPy 2."""
        return interpreter.TensorHandle(np.full(1, -1).astype(interpreter._get_np_dtype(dtype)), dtype.scalar)

    interpreter.InterpreterBuilder.get_all_ones_value = _all_ones

# A shell has its background jobs ignore Ctrl-C, and so would the commands that tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

pytest_plugins = ("tests.support.s3",)


@pytest.fixture(scope="session", autouse=True)
def ray_token() -> Iterator[None]:
    """One token for all clusters: a process keeps the first it sees, and the next cluster would refuse it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
        yield


STARTS_RAY = ("tests/e2e/", "tests/chaos/test_chaos_processes.py", "tests/integration/test_residency_node_store.py")
"""Tests that start Ray clusters: one after the other, and first, for together they take longest."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: not item.nodeid.startswith(STARTS_RAY))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """What the processes of ``-n`` share out: files, and the tests that start Ray as one."""
    from xdist.scheduler import LoadScopeScheduling  # not there where kernels alone are tested

    class Shares(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return "ray" if nodeid.startswith(STARTS_RAY) else nodeid.partition("::")[0]

    return Shares(config, log)
