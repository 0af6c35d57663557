"""How a trace is replayed."""

import httpx
from pydantic import Field, JsonValue

from deltazip_loadgen.errors import SettingInvalid
from deltazip_loadgen.trace import Frozen


class ReplayOptions(Frozen):
    """Settings of one replay. The API key is not among them, so that a report may hold them."""

    speed: float = Field(1.0, gt=0, description="2 replays a trace in half its time")
    duration_s: float | None = Field(None, gt=0, description="start no request after this many seconds")
    max_concurrency: int | None = Field(None, ge=1, description="requests at once; the replay is then not open-loop")
    timeout_s: float = Field(300.0, gt=0, description="for a whole request, from when it is sent")
    connect_timeout_s: float = Field(10.0, gt=0, description="for making a connection")
    extra_body: dict[str, JsonValue] = Field(
        default_factory=dict, description="merged into every request's body, such as ignore_eos"
    )


def api_root(url: str) -> str:
    """The server's address without a trailing slash or /v1; raises :class:`SettingInvalid`."""
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL as error:
        raise SettingInvalid(f"{url!r} is no URL ({error}); write for example http://127.0.0.1:8000") from error
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise SettingInvalid(f"{url!r} is no http(s) URL; write for example http://127.0.0.1:8000")
    return url.rstrip("/").removesuffix("/v1")
