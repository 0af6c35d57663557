"""The ingress deployment: the router's service and its HTTP API around a handle to the replicas."""

import gc
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.serve.handle import DeploymentHandle

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

_SWITCH_S = 0.0005
"""How long a thread that encodes a prompt or writes a long answer may keep the interpreter from the event loop."""


class Router:
    """Serve's ingress: it builds its application when it is made, so that it can hold what cannot be pickled."""

    def __init__(self, config: AppConfig, replicas: DeploymentHandle[Any]) -> None:
        # What was imported stays: looking through it for garbage would hold up everybody's tokens for 0.1 s.
        gc.collect()
        gc.freeze()
        sys.setswitchinterval(_SWITCH_S)
        self._app = serve.get_replica_context().app_name
        store = open_store(config.store)
        self._service = RouterService(
            config, HandleBackend(replicas), lambda digest: Catalog(store, digest), base_files(Path(config.base))
        )

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Serve's hook."""
        return build_api(self._service, RouterMetrics(), self._scrape)

    async def _scrape(self) -> Iterable[tuple[Labels, str]]:
        texts: list[tuple[Labels, str]] = []
        for report in await reports(self._app):
            texts.append(({"node": report.node}, report.store))
            texts += [({"node": report.node, "replica": name}, text) for name, text in report.replicas.items()]
        return texts
