"""Background tasks that nobody awaits."""

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any

logger = logging.getLogger(__name__)


def in_background(work: Coroutine[Any, Any, None], consequence: str) -> asyncio.Task[None]:
    """Run ``work`` in the background. If it fails, the error and its ``consequence`` are logged at once."""
    task = asyncio.create_task(work)

    def tell(task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("%s", consequence, exc_info=error)

    task.add_done_callback(tell)
    return task
