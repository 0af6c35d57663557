"""What stands between HTTP and Serve in Serve's proxies, and behind HAProxy in the router's process."""

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Receive, Scope, Send


def middlewares() -> list[Middleware]:
    """Serve's hook, which ``RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH`` names."""
    return [Middleware(Utf8Headers)]


class Utf8Headers:
    """Has header values in UTF-8: Serve takes this for granted of request ids, and answers 500 where it is not so."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = scope.get("headers", ())
        await self._app({**scope, "headers": [(name, _utf8(value)) for name, value in headers]}, receive, send)


def _utf8(value: bytes) -> bytes:
    """Bytes that are no UTF-8 are Latin-1, as of old in HTTP."""
    try:
        value.decode()
    except UnicodeDecodeError:
        return value.decode("latin-1").encode()
    return value
