"""A live line while a replay runs."""

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from deltazip_loadgen.record import Record
from deltazip_loadgen.replay import Event


class LiveCounts:
    """Counts events and shows them; use as a context manager around the replay."""

    def __init__(self, total: int, console: Console, *, shown: bool = True) -> None:
        """``total``: requests that will be sent."""
        self._sent = self._ok = self._failed = self._tokens = 0
        self._progress = Progress(
            TextColumn("replay"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[counts]}"),
            TimeElapsedColumn(),
            console=console,
            refresh_per_second=4,
            disable=not shown,
        )
        self._task = self._progress.add_task("replay", total=total, counts="")

    def __enter__(self) -> "LiveCounts":
        self._progress.start()
        return self

    def __exit__(self, *reason: object) -> None:
        self._progress.stop()

    def __call__(self, event: Event) -> None:
        """Take one event of the replay."""
        if event.kind == "sent":
            self._sent += 1
        if event.record is not None:
            self._finish(event.record)
        self._progress.update(self._task, completed=self._ok + self._failed, counts=self.counts)

    @property
    def counts(self) -> str:
        """The counts as text."""
        under_way = self._sent - self._ok - self._failed
        return f"{under_way} under way, {self._ok} ok, {self._failed} failed, {self._tokens} tokens"

    def _finish(self, record: Record) -> None:
        if record.ok:
            self._ok += 1
            self._tokens += record.output_tokens or 0
        else:
            self._failed += 1
