"""What /health says."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Health:
    """``starting``: nothing can be answered yet. ``degraded``: what is known is served, but something is wrong."""

    status: Literal["ok", "degraded", "starting"]
    problems: tuple[str, ...] = ()
