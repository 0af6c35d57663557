"""The HTTP endpoints: paths, statuses, headers. The work is done by the service."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial

from fastapi import FastAPI, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, StreamingResponse
from starlette.types import Receive, Scope, Send

from deltazip_deployments.http_errors import answer_for, error_response, plain_error_response
from deltazip_deployments.openai.answers import CHAT, COMPLETION, Answer, Form
from deltazip_deployments.openai.body import read_request
from deltazip_deployments.openai.protocol import ChatRequest, CompletionRequest
from deltazip_deployments.router.keys import ApiKeys, Grant
from deltazip_deployments.router.metrics import RouterMetrics
from deltazip_deployments.router.scrape import Labels, merge
from deltazip_deployments.router.service import RouterService
from deltazip_deployments.text.choices import Choices
from deltazip_ray.errors import DeltaZipError, UnknownVariant

_CLIENT_LEFT = 499

Scrape = Callable[[], Awaitable[Iterable[tuple[Labels, str]]]]


@dataclass(frozen=True)
class _Endpoint:
    """How requests to one path are read and answered."""

    read: Callable[[AsyncIterable[bytes]], Awaitable[CompletionRequest | ChatRequest]]
    form: Form


_COMPLETIONS = _Endpoint(partial(read_request, CompletionRequest), COMPLETION)
_CHATS = _Endpoint(partial(read_request, ChatRequest), CHAT)


class _Stream(StreamingResponse):
    """Server-sent events; however the stream ends, even before the first byte, it ends the generation."""

    def __init__(
        self, events: AsyncGenerator[bytes, None], headers: dict[str, str], done: Callable[[], Awaitable[None]]
    ) -> None:
        super().__init__(events, headers={**headers, "cache-control": "no-cache"}, media_type="text/event-stream")
        self._events = events
        self._done = done

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._events.aclose()
            await self._done()


def build_api(service: RouterService, metrics: RouterMetrics, scrape: Scrape) -> FastAPI:
    """The application, which counts in ``metrics``. ``scrape`` collects what routers, replicas and node stores have to
    tell. Raises ConfigError."""
    keys = ApiKeys(service.config.router.api_keys_file)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await service.start()
        yield
        await service.stop()

    # A redirect would lead to the host and scheme that a request names, which behind TLS are not the client's.
    api = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False, lifespan=lifespan)
    api.add_exception_handler(DeltaZipError, _project_error)
    api.add_exception_handler(HTTPException, _framework_error)
    api.add_exception_handler(Exception, _bug)

    @api.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await _answer(service, metrics, keys, request, _COMPLETIONS)

    @api.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        return await _answer(service, metrics, keys, request, _CHATS)

    @api.get("/v1/models")
    async def models(request: Request) -> Response:
        grant = _grant(keys, request)
        return JSONResponse(
            {"object": "list", "data": [one for one in await service.models() if grant.allows(one["id"])]}
        )

    @api.get("/v1/models/{model:path}")
    async def one_model(request: Request, model: str) -> Response:
        _grant(keys, request).check(model)
        version = await service.resolve(model)
        for entry in await service.models():
            if entry["id"] == model or (version is not None and entry["version"] == version):
                return JSONResponse({**entry, "id": model})
        raise UnknownVariant(f"there is no model {model!r}: GET /v1/models lists those that exist")

    @api.get("/health")
    async def health() -> Response:
        state = service.health()
        status = 503 if state.status == "starting" else 200
        return JSONResponse({"status": state.status, "problems": list(state.problems)}, status_code=status)

    @api.get("/metrics")
    async def all_metrics() -> Response:
        return Response(merge(await scrape()), media_type=CONTENT_TYPE_LATEST)

    return api


async def _answer(
    service: RouterService,
    metrics: RouterMetrics,
    keys: ApiKeys,
    request: Request,
    endpoint: _Endpoint,
) -> Response:
    arrived = metrics.arrived()
    path = request.url.path
    choices: Choices | None = None
    try:
        grant = _grant(keys, request)
        asked = await endpoint.read(request.stream())
        grant.check(asked.model)
        choices = await service.begin(asked)
        metrics.begun(arrived, choices)
        answer = Answer(endpoint.form, choices, include_usage=asked.include_usage)
        headers = {"x-deltazip-version": choices.asked.version or "base", "x-deltazip-tier": choices.tier}
        if asked.stream:
            return _Stream(answer.events(), headers, _closing(metrics, path, choices))
        async with choices:
            whole = await answer.whole()
    except DeltaZipError as error:
        metrics.ended(path, answer_for(error).status, choices)
        raise
    except BaseException as error:
        metrics.ended(path, _CLIENT_LEFT if isinstance(error, asyncio.CancelledError) else 500, choices)
        raise
    metrics.ended(path, 200, choices)
    return Response(whole, headers=headers, media_type="application/json")


def _grant(keys: ApiKeys, request: Request) -> Grant:
    return keys.grant(request.headers.get("authorization"))


def _closing(metrics: RouterMetrics, path: str, choices: Choices) -> Callable[[], Awaitable[None]]:
    async def close() -> None:
        if choices.error is not None:
            status = answer_for(choices.error).status
        else:
            status = 200 if choices.finished else _CLIENT_LEFT
        metrics.ended(path, status, choices)
        await choices.aclose()

    return close


async def _project_error(_: Request, error: Exception) -> Response:
    if not isinstance(error, DeltaZipError):
        raise error
    return error_response(error)


async def _framework_error(_: Request, error: Exception) -> Response:
    if not isinstance(error, HTTPException):
        raise error
    return plain_error_response(error.status_code, f"{error.detail}: the API is under /v1, beside /health and /metrics")


async def _bug(_: Request, __: Exception) -> Response:
    return plain_error_response(500, "the router failed: see its log under this answer's x-request-id")
