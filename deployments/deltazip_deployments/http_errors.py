"""Maps the project's errors to HTTP statuses and OpenAI error bodies. Nothing else does."""

import math
from dataclasses import dataclass
from typing import Any

from starlette.responses import JSONResponse

from deltazip_ray.errors import (
    ArtifactError,
    CompressionError,
    ConfigError,
    DeltaZipError,
    EngineError,
    EngineStopped,
    InvalidKey,
    LoadTimeout,
    NotAllowed,
    ObjectNotFound,
    Overloaded,
    PromptTooLong,
    RequestError,
    RequestTimeout,
    StoreError,
    UnknownVariant,
)


@dataclass(frozen=True)
class ErrorAnswer:
    """The answer to an error: status, OpenAI's ``type`` and ``code``, and seconds until a retry makes sense."""

    status: int
    type: str
    code: str
    retry_after_s: int | None = None


_ANSWERS: dict[type[DeltaZipError], ErrorAnswer] = {
    DeltaZipError: ErrorAnswer(500, "server_error", "internal_error"),
    ConfigError: ErrorAnswer(500, "server_error", "misconfigured"),
    RequestError: ErrorAnswer(400, "invalid_request_error", "invalid_request"),
    UnknownVariant: ErrorAnswer(404, "invalid_request_error", "model_not_found"),
    InvalidKey: ErrorAnswer(401, "invalid_request_error", "invalid_api_key"),
    NotAllowed: ErrorAnswer(403, "invalid_request_error", "model_not_allowed"),
    PromptTooLong: ErrorAnswer(400, "invalid_request_error", "context_length_exceeded"),
    Overloaded: ErrorAnswer(429, "rate_limit_error", "overloaded", retry_after_s=1),
    ArtifactError: ErrorAnswer(500, "server_error", "variant_unusable"),
    StoreError: ErrorAnswer(503, "server_error", "store_unavailable", retry_after_s=2),
    ObjectNotFound: ErrorAnswer(500, "server_error", "variant_unusable"),
    LoadTimeout: ErrorAnswer(503, "server_error", "load_timeout", retry_after_s=5),
    RequestTimeout: ErrorAnswer(504, "server_error", "request_timeout"),
    EngineError: ErrorAnswer(500, "server_error", "engine_error"),
    EngineStopped: ErrorAnswer(503, "server_error", "no_replica", retry_after_s=2),
    CompressionError: ErrorAnswer(500, "server_error", "variant_unusable"),
}


def answer_for(error: DeltaZipError) -> ErrorAnswer:
    """The answer for the error's class, or for its nearest ancestor that has one."""
    return next(_ANSWERS[kind] for kind in type(error).__mro__ if kind in _ANSWERS)


def error_body(error: DeltaZipError) -> dict[str, Any]:
    """OpenAI's error object."""
    answer = answer_for(error)
    param = getattr(error, "param", None)
    if isinstance(error, UnknownVariant | NotAllowed):
        param = "model"
    return {"error": {"message": error.message, "type": answer.type, "param": param, "code": answer.code}}


def error_response(error: DeltaZipError) -> JSONResponse:
    """The complete HTTP answer, with ``Retry-After`` if a retry may succeed."""
    answer = answer_for(error)
    headers = {} if answer.retry_after_s is None else {"retry-after": str(_retry_after_s(error, answer.retry_after_s))}
    if isinstance(error, InvalidKey):
        headers["www-authenticate"] = "Bearer"
    return JSONResponse(error_body(error), status_code=answer.status, headers=headers)


def _retry_after_s(error: DeltaZipError, usual_s: int) -> int:
    known_s = error.retry_after_s if isinstance(error, StoreError) else None
    return usual_s if known_s is None else max(1, math.ceil(known_s))


def plain_error_response(status: int, message: str) -> JSONResponse:
    """An OpenAI error body for errors of the web framework: unknown path, wrong method, an unexpected exception."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    code = {404: "not_found", 405: "method_not_allowed"}.get(
        status, "internal_error" if status >= 500 else "invalid_request"
    )
    return JSONResponse({"error": {"message": message, "type": kind, "param": None, "code": code}}, status_code=status)
