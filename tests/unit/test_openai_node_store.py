"""The node store's parts that know no Ray: leases and shared memory."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from deltazip_deployments.node_store.arena import Arena, ArenaRef, map_arena
from deltazip_deployments.node_store.leases import Leases
from deltazip_ray.errors import ConfigError, StoreUnavailable


def test_a_silent_replica_loses_its_holds() -> None:
    leases = Leases(timeout_s=10, now=0)
    leases.touch("a", 0)
    leases.touch("b", 0)
    for version in ("v", "v", "w"):
        leases.add("a", version)
    leases.touch("b", 9)
    assert leases.silent(10) == []
    assert leases.silent(10.5) == ["a"]
    assert sorted(leases.drop("a")) == ["v", "v", "w"]
    assert leases.drop("a") == []
    assert leases.replicas == {"b"}
    assert not leases.remove("a", "v")


def test_holds_are_counted() -> None:
    leases = Leases(timeout_s=10, now=0)
    leases.add("a", "v")
    leases.add("a", "v")
    assert [leases.remove("a", "v") for _ in range(3)] == [True, True, False]
    assert not leases.remove("a", "w")


def test_time_alone_counts_from_the_last_replica() -> None:
    leases = Leases(timeout_s=10, now=100)
    assert leases.alone_s(105) == 5
    leases.touch("a", 106)
    assert leases.alone_s(107) == 0
    leases.drop("a")
    assert leases.alone_s(110) == 3


def test_another_process_reads_the_arena_and_cannot_write_it(tmp_path: Path) -> None:
    arena = Arena(tmp_path, 1 << 20)
    arena.buffer[:5] = b"delta"
    read = (
        "from deltazip_deployments.node_store.arena import *\n"
        f"view = map_arena(ArenaRef({os.getpid()}, {arena.ref.fd}, {arena.ref.size}))\n"
        "assert view.readonly\n"
        "print(bytes(view[:5]).decode())"
    )
    done = subprocess.run([sys.executable, "-c", read], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "delta"
    assert list(tmp_path.iterdir()) == []


def test_views_outlive_the_arena(tmp_path: Path) -> None:
    arena = Arena(tmp_path, 1 << 20)
    arena.buffer[:5] = b"delta"
    view = map_arena(arena.ref)[1:5]
    del arena
    assert bytes(view) == b"elta"


def test_an_arena_that_does_not_fit_says_what_to_change(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="arena_bytes"):
        Arena(tmp_path, 1 << 60)


def test_an_arena_that_is_gone_is_unavailable(tmp_path: Path) -> None:
    arena = Arena(tmp_path, 1 << 20)
    with pytest.raises(StoreUnavailable):
        map_arena(ArenaRef(arena.ref.pid, 10_000, arena.ref.size))
    with pytest.raises(StoreUnavailable):
        map_arena(ArenaRef(arena.ref.pid, arena.ref.fd, 2 << 20))
