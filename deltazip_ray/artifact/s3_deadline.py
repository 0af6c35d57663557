"""A bound on how long an S3 server may take for its headers.

A read timeout is no such bound: it ends nobody who sends a byte now and then.
"""

import http.client
import socket
import threading
from contextlib import suppress
from typing import Any, cast


class _InTime(http.client.HTTPConnection):
    """A mixin for connections: headers must be there after two read timeouts, one of which the first byte has."""

    def getresponse(self) -> Any:
        late = threading.Event()
        watch = threading.Timer(2 * cast("float", self.timeout), _cut, (self.sock, late))
        watch.daemon = True
        watch.start()
        try:
            return super().getresponse()
        finally:
            watch.cancel()
            if late.is_set():  # Headers that were cut off look like an answer without the others.
                raise TimeoutError


def bound_headers(client: Any) -> None:
    """Have all requests of a boto3 client time out when their headers take longer than two of its read timeouts."""
    # boto3 takes no classes of connections from outside.
    pools = client._endpoint.http_session._pool_classes_by_scheme
    pools.update({scheme: _bounded(pool) for scheme, pool in pools.items()})


def _bounded(pool: Any) -> type:
    """A class of urllib3's pools, with bounded connections."""
    connection = type("BoundedConnection", (_InTime, pool.ConnectionCls), {})
    return type("BoundedPool", (pool,), {"ConnectionCls": connection})


def _cut(sock: socket.socket, late: threading.Event) -> None:
    late.set()
    with suppress(OSError):  # It has just been closed.
        sock.shutdown(socket.SHUT_RDWR)
