"""The ingress deployment: the router's service and its HTTP API around a handle to the replicas."""

import asyncio
import gc
import logging
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from deltazip_deployments.logs import log_with_serve
from deltazip_deployments.node_store.discovery import reports
from deltazip_deployments.router.api import build_api
from deltazip_deployments.router.backend import HandleBackend
from deltazip_deployments.router.metrics import RouterMetrics
from deltazip_deployments.router.scrape import Labels
from deltazip_deployments.router.service import RouterService
from deltazip_deployments.text.version_files import base_files
from deltazip_ray.artifact.catalog import Catalog
from deltazip_ray.artifact.store import open_store
from deltazip_ray.config import AppConfig

logger = logging.getLogger(__name__)

_REPORT_TIMEOUT_S = 2.0
_SWITCH_S = 0.0005
"""How long a thread that encodes a prompt or writes a long answer may keep the interpreter from the event loop."""


class Router:
    """Serve's ingress: it builds its application when it is made, so that it can hold what cannot be pickled."""

    def __init__(self, config: AppConfig, replicas: DeploymentHandle[Any]) -> None:
        # What was imported stays: looking through it for garbage would hold up everybody's tokens for 0.1 s.
        gc.collect()
        gc.freeze()
        sys.setswitchinterval(_SWITCH_S)
        log_with_serve()
        context = serve.get_replica_context()
        self._app, self._deployment, self._name = context.app_name, context.deployment, context.replica_tag
        self._metrics = RouterMetrics()
        store = open_store(config.store)
        self._service = RouterService(
            config, HandleBackend(replicas), lambda digest: Catalog(store, digest), base_files(Path(config.base))
        )

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Serve's hook."""
        return build_api(self._service, self._metrics, self._scrape)

    async def report(self) -> tuple[str, str]:
        """This router's name and what it counts, for whichever router is scraped."""
        return self._name, self._metrics.text()

    async def _scrape(self) -> Iterable[tuple[Labels, str]]:
        routers, hosts = await asyncio.gather(self._routers(), reports(self._app))
        texts: list[tuple[Labels, str]] = [({"router": name}, text) for name, text in routers.items()]
        for report in hosts:
            texts.append(({"node": report.node}, report.store))
            texts += [({"node": report.node, "replica": name}, text) for name, text in report.replicas.items()]
        return texts

    async def _routers(self) -> dict[str, str]:
        """What all routers count, by name; one that does not answer soon is left out."""
        found = dict([await self.report()])
        try:
            everybody = serve.get_deployment_handle(self._deployment, self._app).broadcast("report")
            told = await everybody.results_async(timeout_s=_REPORT_TIMEOUT_S, return_exceptions=True)
        except (RayError, RayServeException, TimeoutError) as error:
            logger.warning("other routers are missing from this scrape: %s", error)
            return found
        return found | dict(one for one in told if not isinstance(one, Exception))
