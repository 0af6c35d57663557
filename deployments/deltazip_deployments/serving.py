"""Runs the application from a program: the ``deltazip serve`` command, the demo, tests.

Everything that is started here is also ended here, however the program ends: Ray's processes, the detached node stores,
their memory.
"""

import contextlib
import logging
import os
import re
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any, NoReturn

import httpx
import ray
from ray import serve
from ray._private import ray_constants, worker

from deltazip_deployments.app import SERVE_ENVIRONMENT, application
from deltazip_deployments.node_store.discovery import kill_stores
from deltazip_deployments.processes import end_marked, marked
from deltazip_deployments.replica import EngineFactory, make_engine
from deltazip_ray.config import AppConfig
from deltazip_ray.errors import ConfigError, EngineError

logger = logging.getLogger(__name__)

APP_NAME = "deltazip"
_HEALTH_PAUSE_S = 0.1
_READY_TIMEOUT_S = 600.0
_WATCH_S = 1.0
_OUR_ERROR = re.compile(r"^deltazip_ray\.errors\.\w+: (.+)", re.MULTILINE)


def deploy(
    config: AppConfig,
    host: str = "127.0.0.1",
    port: int = 8000,
    *,
    engine_factory: EngineFactory = make_engine,
) -> str:
    """Run the application on the Ray cluster that this process is connected to; returns its URL once it answers.

    Raises EngineError; call :func:`stop` even then, or use :func:`running`.
    """
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    serve.start(proxy_location="HeadOnly", http_options={"host": host, "port": port})
    try:
        serve.run(application(config, engine_factory), name=APP_NAME, route_prefix="/")
    except RuntimeError as error:
        raise EngineError(f"the application does not come up: {error}\n{_why_not()}") from error
    url = f"http://{host}:{port}"
    _wait_until_healthy(url)
    return url


def stop(*, owns_ray: bool) -> None:
    """End the application, its node stores and, if ``owns_ray``, Serve and Ray. Can be called again."""
    try:
        if ray.is_initialized() and (not owns_ray or "RAY_ADDRESS" in os.environ):
            try:
                serve.delete(APP_NAME)
            except TimeoutError:
                logger.warning("requests are still being answered: Serve ends the application after the last one")
            kill_stores(APP_NAME)
    finally:
        if owns_ray:
            # The cluster takes all actors with it; HAProxy, if Serve uses it, is a separate process.
            ray.shutdown()
            end_marked()


@contextlib.contextmanager
def running(
    config: AppConfig,
    host: str = "127.0.0.1",
    port: int = 8000,
    *,
    engine_factory: EngineFactory = make_engine,
) -> Iterator[str]:
    """Run the application during the block; yields its URL. SIGTERM ends the block like Ctrl-C.

    Connects to Ray if this process is not connected (see :func:`connect`), and then also ends or leaves it.
    Raises ConfigError, EngineError.
    """
    owns_ray = not ray.is_initialized()
    try:
        connect(config)
        with _sigterm_as_interrupt():
            yield deploy(config, host, port, engine_factory=engine_factory)
    finally:
        with _uninterrupted():
            stop(owns_ray=owns_ray)


def watch() -> NoReturn:
    """Wait for as long as the Ray lives that this process has started, for ever where it has started none.

    Raises EngineError when the raylet or the GCS has ended: Serve cannot heal that.
    """
    vital = {ray_constants.PROCESS_TYPE_RAYLET, ray_constants.PROCESS_TYPE_GCS_SERVER}
    node: Any = worker._global_node
    while not any(kind in vital for kind, _ in node.dead_processes()):
        time.sleep(_WATCH_S)
    raise EngineError("Ray has ended on this machine (killed, or out of memory?): start the command again")


def connect(config: AppConfig) -> None:
    """Connect to the Ray cluster of ``RAY_ADDRESS``, or start one on loopback without a dashboard.

    Does nothing if this process is connected already. Raises ConfigError.
    """
    if ray.is_initialized():
        return
    if "RAY_ADDRESS" in os.environ:
        try:
            ray.init(address="auto", log_to_driver=False, logging_level=logging.ERROR)
        except ConnectionError as error:
            raise ConfigError(
                f"no Ray answers at RAY_ADDRESS={os.environ['RAY_ADDRESS']}: correct it, or unset it to start one here"
            ) from error
        if missing := _missing_gpus(config):
            logger.warning("%s: waiting until the cluster has grown", missing)
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    for name, value in SERVE_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    # On Linux Ray listens on all interfaces and rejects loopback addresses, unless it is told that there is only this
    # host (the default on other systems). The variable is for the processes that Ray starts.
    os.environ[ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR] = "0"
    ray_constants.ENABLE_RAY_CLUSTER = False
    wanted = config.replicas * config.resources.get("CPU", 0.0)
    with marked(), _interrupts_deferred():
        ray.init(
            address="local",
            # Logical CPUs: replicas on a small machine share its cores instead of waiting for each other forever.
            num_cpus=max(os.cpu_count() or 1, int(wanted) + 1),
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    if missing := _missing_gpus(config):
        # Serve would wait forever.
        raise ConfigError(
            f"{missing}: lower replicas, share a GPU with replica_resources.GPU below 1, or set engine.device to cpu"
        )


def _missing_gpus(config: AppConfig) -> str | None:
    """The message if the replicas need more GPUs than the cluster has, otherwise None."""
    wanted = config.replicas * config.resources.get("GPU", 0.0)
    resources: Any = ray.cluster_resources  # has no types
    there = resources().get("GPU", 0.0)
    return f"the replicas ask for {wanted:g} GPUs, but Ray finds {there:g}" if wanted > there else None


def _why_not() -> str:
    """Why each deployment failed: the project's own error at the root if there is one, otherwise Serve's message."""
    application = serve.status().applications.get(APP_NAME)
    deployments = application.deployments if application else {}
    return "\n".join(f"{name}: {root_error(one.message)}" for name, one in deployments.items() if one.message)


def root_error(trace: str) -> str:
    """The last error of this project in the text of a traceback; the whole text if there is none."""
    ours = _OUR_ERROR.findall(trace)
    return ours[-1] if ours else trace


def _wait_until_healthy(url: str) -> None:
    deadline = time.monotonic() + _READY_TIMEOUT_S
    while True:
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(f"{url}/health", timeout=5.0).status_code == 200:
                return
        if time.monotonic() > deadline:
            raise EngineError(
                f"{url}/health does not answer after {_READY_TIMEOUT_S:g} s: is something else on the port?"
            )
        time.sleep(_HEALTH_PAUSE_S)


@contextlib.contextmanager
def _sigterm_as_interrupt() -> Iterator[None]:
    """Enter it after connecting to Ray, which installs a handler of its own that exits without cleanup."""

    def interrupt(signum: int, _: object) -> None:
        raise KeyboardInterrupt(f"signal {signum}")

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _interrupts_deferred() -> Iterator[None]:
    """Ray crashes when it is interrupted while it connects: Ctrl-C takes effect some seconds later, at the end."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: came.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if came:
        raise KeyboardInterrupt


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Ignore signals during the cleanup: a second Ctrl-C must not leave half of the processes behind."""
    handlers = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
