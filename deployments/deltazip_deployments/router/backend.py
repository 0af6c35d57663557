"""What the router needs of the replicas, and how it gets it through a Serve handle."""

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any, Protocol

import grpc
from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import DeploymentUnavailableError, RequestCancelledError

from deltazip_deployments.ray_errors import unwrapped
from deltazip_ray.errors import EngineStopped
from deltazip_ray.scheduler.request import GenerateRequest, TokenChunk


@dataclass(frozen=True)
class ReplicaDescription:
    """What all replicas have in common."""

    base_digest: str
    max_model_len: int


class Backend(Protocol):
    """The replicas."""

    async def describe(self) -> ReplicaDescription:
        """Ask any replica; waits until there is one. Raises EngineStopped when it dies over it."""
        ...

    def generate(self, request: GenerateRequest) -> AsyncGenerator[TokenChunk, None]:
        """Run a request on the replica that suits it. Closing the generator cancels the request there.

        Raises what AsyncEngine.generate raises; EngineStopped also when the replica is gone.
        """
        ...


class HandleBackend:
    """Replicas behind a deployment handle, reached by gRPC: a chunk costs a quarter of what an actor call does."""

    def __init__(self, handle: Any) -> None:
        self._describe = handle.options(method_name="describe", _by_reference=False)
        self._generate = handle.options(method_name="generate", stream=True, _by_reference=False)

    async def describe(self) -> ReplicaDescription:
        """See Backend."""
        try:
            description: ReplicaDescription = await self._describe.remote()
        except (RayActorError, DeploymentUnavailableError) as error:
            raise EngineStopped(_GONE) from error
        return description

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[TokenChunk, None]:
        """See Backend. The version travels as the model id that placement goes by."""
        chunks = self._generate.options(multiplexed_model_id=request.version or "").remote(request)
        finished = False
        try:
            async for chunk in chunks:
                finished = chunk.finish_reason is not None
                yield chunk
        except RayTaskError as error:
            raise unwrapped(error) from error
        except (RayActorError, RequestCancelledError, DeploymentUnavailableError, grpc.aio.AioRpcError) as error:
            raise EngineStopped(_GONE) from error
        finally:
            chunks.cancel()
        if not finished:
            raise EngineStopped(_GONE)


_GONE = "the replica that worked on this request is gone: send the request again"
