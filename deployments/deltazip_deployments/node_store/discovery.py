"""Finds node stores by a name made of application, node and settings."""

import asyncio
import hashlib
import logging
from collections.abc import Callable
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from deltazip_deployments.node_store.actor import NodeStoreActor
from deltazip_deployments.node_store.client import NodeStoreClient
from deltazip_deployments.node_store.protocol import NodeReport
from deltazip_ray.config import AppConfig

NAMESPACE = "deltazip"
_REPORT_TIMEOUT_S = 2.0
_CALLS = 1_000_000
"""Concurrent calls: waiting loads must never block the releases that they wait for, or heartbeats."""

logger = logging.getLogger(__name__)


def store_name(app: str, node: str, config: AppConfig, base_digest: str) -> str:
    """The actor's name. It depends on the settings, so that a store with old settings is not used."""
    settings = f"{base_digest}|{config.store.model_dump_json()}|{config.node_store.model_dump_json()}"
    return f"{_prefix(app)}{node}:{hashlib.sha256(settings.encode()).hexdigest()[:12]}"


def find_or_start(app: str, config: AppConfig, base_digest: str) -> Any:
    """The handle of this node's store, which is started if there is none. Blocking."""
    node = ray.get_runtime_context().get_node_id()
    name = store_name(app, node, config, base_digest)
    options = NodeStoreActor.options(
        name=name,
        namespace=NAMESPACE,
        lifetime="detached",
        get_if_exists=True,
        num_cpus=0,
        max_concurrency=_CALLS,
        scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False),
    )
    return options.remote(node, config.store, config.node_store, base_digest)


def node_store_client(app: str, replica: str, config: AppConfig, base_digest: Callable[[], str]) -> NodeStoreClient:
    """The client of one replica."""
    return NodeStoreClient(replica, lambda: find_or_start(app, config, base_digest()))


def list_stores(app: str) -> list[str]:
    """Names of the application's node stores in the cluster. Blocking."""
    named = ray.util.list_named_actors(all_namespaces=True)
    return [one["name"] for one in named if one["namespace"] == NAMESPACE and one["name"].startswith(_prefix(app))]


async def reports(app: str) -> list[NodeReport]:
    """The reports of all node stores; those that do not answer in time are left out."""
    names = await asyncio.to_thread(list_stores, app)
    found = await asyncio.gather(*(_report(name) for name in names))
    return [report for report in found if report is not None]


def kill_stores(app: str) -> None:
    """End the application's node stores now. Blocking."""
    for name in list_stores(app):
        try:
            ray.kill(ray.get_actor(name, namespace=NAMESPACE))
        except ValueError:
            logger.debug("node store %s ended by itself", name)


async def _report(name: str) -> NodeReport | None:
    try:
        actor = await asyncio.to_thread(ray.get_actor, name, namespace=NAMESPACE)
        async with asyncio.timeout(_REPORT_TIMEOUT_S):
            report: NodeReport = await actor.report.remote()
    except (ValueError, RayError, TimeoutError) as error:
        logger.warning("node store %s is missing from this scrape: %s", name, error)
        return None
    return report


def _prefix(app: str) -> str:
    return f"node-store:{app}:"
