"""The answer of /health."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Health:
    """``starting``: no request can be answered yet. ``degraded``: known variants are served, but there is a problem."""

    status: Literal["ok", "degraded", "starting"]
    problems: tuple[str, ...] = ()
