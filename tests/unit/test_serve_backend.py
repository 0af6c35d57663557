"""What calls through a Serve handle end with, when the other side fails or is gone."""

from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from ray.exceptions import ActorDiedError, RayTaskError
from ray.serve.exceptions import RequestCancelledError

from deltazip_deployments.router.backend import HandleBackend
from deltazip_ray.errors import DeltaZipError, EngineError, EngineStopped, Overloaded
from deltazip_ray.scheduler.request import GenerateRequest, SamplingParams

REQUEST = GenerateRequest("r", "v" * 64, (1, 2), SamplingParams(max_tokens=3))


class Handle:
    """A handle whose every call ends with one error."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    def options(self, **_: Any) -> "Handle":
        return self

    def remote(self, *_: Any) -> Any:
        return _Chunks(self._error)


class _Chunks:
    """What a call returns: to be awaited, or to be iterated."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    def __await__(self) -> Any:
        raise self._error
        yield

    async def __aiter__(self) -> AsyncIterator[Any]:
        raise self._error
        yield

    def cancel(self) -> None:
        """Nothing runs."""


def grpc_error() -> Exception:
    nothing = grpc.aio.Metadata()
    return grpc.aio.AioRpcError(grpc.StatusCode.UNAVAILABLE, nothing, nothing)


@pytest.mark.parametrize(
    ("error", "seen"),
    [
        (grpc_error(), EngineStopped),
        (ActorDiedError(), EngineStopped),
        (RequestCancelledError(), EngineStopped),
        (RayTaskError("f", "trace", Overloaded("full")), Overloaded),
        (RayTaskError("f", "trace", KeyError("a bug")), EngineError),
    ],
    ids=lambda error: error.__name__ if isinstance(error, type) else type(error).__name__,
)
async def test_every_end_of_a_call_is_an_error_of_this_project(error: Exception, seen: type[DeltaZipError]) -> None:
    backend = HandleBackend(Handle(error))
    with pytest.raises(DeltaZipError) as described:
        await backend.describe()
    with pytest.raises(DeltaZipError) as generated:
        async for _ in backend.generate(REQUEST):
            pass
    assert type(described.value) is type(generated.value) is seen
