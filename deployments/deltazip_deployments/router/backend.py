"""The router's interface to the replicas, and its implementation by a Serve handle."""

import asyncio
import contextvars
import logging
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import grpc
from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import DeploymentUnavailableError, RequestCancelledError

from deltazip_deployments.placement import Heat
from deltazip_deployments.ray_errors import unwrapped
from deltazip_deployments.request_router import PREFETCH
from deltazip_ray.errors import EngineStopped
from deltazip_ray.scheduler.request import GenerateRequest, TokenChunk

_LOST = (RayActorError, RequestCancelledError, DeploymentUnavailableError, grpc.aio.AioRpcError)
"""Exceptions of calls whose replica is gone."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ReplicaDescription:
    """The properties that all replicas share."""

    base_digest: str
    max_model_len: int


class Backend(Protocol):
    """The replicas."""

    async def describe(self) -> ReplicaDescription:
        """Ask any replica; waits until there is one. Raises EngineStopped if it dies meanwhile, EngineError."""
        ...

    async def bring(self, version: str) -> None:
        """Prefetch a version where it will be needed; returns when it is there or has failed. Raises nothing."""
        ...

    def generate(self, request: GenerateRequest) -> AsyncGenerator[TokenChunk, None]:
        """Run a request on the best replica. Closing the generator cancels the request there.

        Raises the errors of AsyncEngine.generate; EngineStopped also if the replica is gone.
        """
        ...


class HandleBackend:
    """Replicas behind a deployment handle, called by gRPC: a chunk costs a quarter of an actor call."""

    def __init__(self, handle: Any) -> None:
        self._prefetch = handle.options(method_name=PREFETCH, _by_reference=False)
        self._heat = Heat()
        self._hints: set[asyncio.Task[None]] = set()
        self._describe = handle.options(method_name="describe", _by_reference=False)
        self._generate = handle.options(
            method_name="generate", stream=True, _by_reference=False, response_serialization="pickle"
        )

    async def describe(self) -> ReplicaDescription:
        """See Backend."""
        with _as_our_own():
            description: ReplicaDescription = await self._describe.remote()
        return description

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[TokenChunk, None]:
        """See Backend. The version is passed as the model id, which placement uses."""
        with _as_our_own():
            chunks = self._generate.options(multiplexed_model_id=request.version or "").remote(request)
        if request.version is not None and self._heat.began(request.version):
            # In a context of its own, as Serve attributes calls to the HTTP request of their context.
            hint = asyncio.create_task(self.bring(request.version), context=contextvars.Context())
            self._hints.add(hint)
            hint.add_done_callback(self._hints.discard)
        finished = False
        try:
            with _as_our_own():
                async for chunk in chunks:
                    finished = chunk.finish_reason is not None
                    yield chunk
        finally:
            chunks.cancel()
            if request.version is not None:
                self._heat.ended(request.version)
        if not finished:
            raise EngineStopped(_GONE)

    async def bring(self, version: str) -> None:
        """See Backend. A version that some replica has goes to where its requests would spill to."""
        try:
            await self._prefetch.options(multiplexed_model_id=version).remote(version)
        except (*_LOST, RayTaskError) as error:
            logger.info("the prefetch of version %s failed: %r", version[:12], error)


@contextmanager
def _as_our_own() -> Iterator[None]:
    """Turns errors of calls into this project's: the replica's own error, or EngineStopped if the replica is gone."""
    try:
        yield
    except RayTaskError as error:
        raise unwrapped(error) from error
    except _LOST as error:
        raise EngineStopped(_GONE) from error


_GONE = "the replica that worked on this request is gone: send the request again"
