"""Checks before Ray is started, so that errors take seconds and one line, not minutes and a replica's traceback."""

import os
import socket
from contextlib import suppress
from pathlib import Path

from deltazip_deployments.text.version_files import base_files
from deltazip_ray.artifact.catalog import bases
from deltazip_ray.artifact.checkpoint import Checkpoint
from deltazip_ray.artifact.store import open_store
from deltazip_ray.config import AppConfig, StoreConfig
from deltazip_ray.errors import ConfigError, StoreError
from deltazip_ray.layers.device import check_device
from deltazip_ray.models.decoder_config import read_decoder_config

_CLUSTER_TIMEOUT_S = 5.0
_STORE_TIMEOUT_S = 3.0


def check_host(config: AppConfig, host: str, port: int) -> None:
    """Check that this host can run the server. Raises ConfigError, CheckpointInvalid."""
    _check_port(host, port)
    check_device(config.engine.device, "engine.device")
    read_decoder_config(Checkpoint.open(Path(config.base)).config)
    base_files(Path(config.base))
    _check_arena(config.node_store.shm_dir, config.node_store.arena_bytes)


def check_cluster(address: str) -> None:
    """Check that something listens at ``RAY_ADDRESS``; Ray would wait for minutes. Raises ConfigError."""
    host, _, port = address.rpartition(":")
    if "://" in address or not port.isdecimal():
        return
    try:
        socket.create_connection((host, int(port)), timeout=_CLUSTER_TIMEOUT_S).close()
    except OSError as error:
        raise ConfigError(
            f"no Ray cluster answers at RAY_ADDRESS={address} ({error}): correct it, or unset it to start one here"
        ) from error


def store_problem(store: StoreConfig) -> str | None:
    """Why there are no variants to serve yet, if so. The server starts anyway and tries again. Raises ConfigError."""
    quick = store.model_copy(update={"max_attempts": 1, "timeout_s": min(store.timeout_s, _STORE_TIMEOUT_S)})
    try:
        if not bases(open_store(quick)):
            return f"{store.url} holds no variants yet: `deltazip publish` adds one, also while this runs"
    except StoreError as error:
        return error.message
    return None


def _check_port(host: str, port: int) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
        except (OSError, OverflowError, TypeError) as error:
            problem = error.strerror if isinstance(error, OSError) else error
            raise ConfigError(f"cannot listen on {host}:{port} ({problem}): give another --port") from error


def _check_arena(folder: Path, size: int) -> None:
    with suppress(FileNotFoundError):
        there = os.statvfs(folder)
        free = there.f_bavail * there.f_frsize
        if free < size:
            raise ConfigError(
                f"{folder} has {free >> 20} MiB left, but node_store.arena_bytes is {size >> 20} MiB: "
                "lower it, or increase the shared memory of the host or pod"
            )
        return
    raise ConfigError(f"there is no folder {folder}: correct node_store.shm_dir")
