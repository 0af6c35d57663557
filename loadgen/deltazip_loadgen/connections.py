"""Connections that never make a request wait for another one."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Self

import httpx

from deltazip_loadgen.options import ReplayOptions

if TYPE_CHECKING:
    import ssl

# Below the keep-alive time of common servers (uvicorn: 5 s), or requests would meet connections that just closed.
KEEPALIVE_S = 2.0


class Connections:
    """Lends one connection a request: an idle one, else a new one.

    Each is an ``httpx`` client of its own, for httpx's pool looks through all its connections at every request
    and response, which at a thousand open streams makes the load generator the slowest part.
    """

    def __init__(self, root: str, options: ReplayOptions, api_key: str | None) -> None:
        self._root = root
        # Compressed streams arrive in larger groups than the server made.
        self._headers = {"accept-encoding": "identity"}
        if api_key:
            self._headers["authorization"] = f"Bearer {api_key}"
        self._timeout = httpx.Timeout(None, connect=options.connect_timeout_s)
        self._tls: ssl.SSLContext | bool = httpx.create_ssl_context() if root.startswith("https:") else False
        self._idle: list[httpx.AsyncClient] = []

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        while self._idle:
            await self._idle.pop().aclose()

    @asynccontextmanager
    async def lend(self) -> AsyncIterator[httpx.AsyncClient]:
        """A client for one request."""
        client = self._idle.pop() if self._idle else self._new()
        try:
            yield client
        finally:
            self._idle.append(client)

    def _new(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(
            base_url=self._root,
            headers=self._headers,
            timeout=self._timeout,
            limits=httpx.Limits(max_connections=1, keepalive_expiry=KEEPALIVE_S),
            verify=self._tls,
            trust_env=False,
        )
