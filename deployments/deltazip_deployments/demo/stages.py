"""Progress on stderr: a live display on a terminal, otherwise two lines per stage. Also measures each stage's time."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeElapsedColumn


class Bar:
    """The progress of one stage."""

    def __init__(self, bars: Progress, task: TaskID) -> None:
        self._bars = bars
        self._task = task

    def advance(self, done: float = 1) -> None:
        """Add ``done`` to the work that is done."""
        self._bars.update(self._task, advance=done)

    def reach(self, what: str, done: float) -> None:
        """Set the work that is done. ``what`` is not shown, as it changes too fast."""
        self._bars.update(self._task, completed=done)


class Stages:
    """A context manager around all stages."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.seconds: dict[str, float] = {}
        """By stage, in the order in which they ended."""
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            console=console,
            disable=not console.is_terminal,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def pause(self) -> None:
        """Leave the current display as it is; the next stage starts a new one."""
        self._bars.stop()
        for task in self._bars.task_ids:
            self._bars.remove_task(task)

    @contextmanager
    def stage(self, name: str, total: float | None = None) -> Iterator[Bar]:
        """Show a stage during the block; ``total`` is its amount of work, None if unknown."""
        self._bars.start()
        task = self._bars.add_task(name, total=total)
        self._line(f"{name}: started")
        began = time.monotonic()
        yield Bar(self._bars, task)
        self.seconds[name] = round(time.monotonic() - began, 3)
        self._bars.update(task, total=1.0, completed=1.0)
        self._line(f"{name}: {self.seconds[name]:.1f} s")

    def _line(self, text: str) -> None:
        if not self.console.is_terminal:
            self.console.print(text, markup=False, highlight=False, soft_wrap=True)
