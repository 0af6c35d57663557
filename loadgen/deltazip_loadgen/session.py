"""One replay as a command runs it: outputs checked first, Ctrl-C heard, records written as they come."""

import asyncio
import resource
import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TextIO

from rich.console import Console

from deltazip_loadgen.errors import SettingInvalid, TraceInvalid
from deltazip_loadgen.options import ReplayOptions, api_root
from deltazip_loadgen.plot import check_plotting, plot
from deltazip_loadgen.progress import LiveCounts
from deltazip_loadgen.record import Record
from deltazip_loadgen.replay import Event, replay
from deltazip_loadgen.report import Report, RunInfo, Slo, summarize
from deltazip_loadgen.trace import TraceFile, parse_line, read_lines


@dataclass(frozen=True)
class Outputs:
    """Files to write; None for those that nobody wants."""

    json: Path | None = None
    plot: Path | None = None
    records: Path | None = None

    def check(self) -> None:
        """Find out before the replay what would be lost after it."""
        for path in (self.json, self.plot, self.records):
            if path is not None and not path.parent.is_dir():
                raise SettingInvalid(f"cannot write {path}: the folder {path.parent} does not exist; create it first")
        if self.plot is not None:
            check_plotting()

    def write(self, records: list[Record], report: Report) -> None:
        """Write the report and its picture; the records are written as they come."""
        if self.json is not None:
            self.json.write_text(report.model_dump_json(indent=2) + "\n", encoding="utf-8")
        if self.plot is not None:
            plot(records, report, self.plot)


@dataclass(frozen=True)
class Session:
    """A trace to replay and where the results go."""

    trace: TraceFile
    url: str
    options: ReplayOptions
    slo: Slo
    outputs: Outputs
    api_key: str | None = None

    def run(self, console: Console, *, quiet: bool) -> Report:
        """Replay; on the first Ctrl-C stop and report on what was done, on the second give up."""
        root = api_root(self.url)
        self.outputs.check()
        _allow_many_connections()
        # The whole trace is checked before anything is sent, not when half of it has been.
        end_s = float("inf") if self.options.duration_s is None else self.options.duration_s * self.options.speed
        total = sum(request.at_s <= end_s for request in self.trace)
        started_at = datetime.now(UTC)
        with ExitStack() as stack:
            counts = stack.enter_context(LiveCounts(total, console, shown=not quiet))
            path = self.outputs.records
            file = stack.enter_context(path.open("w", encoding="utf-8")) if path else None
            records, interrupted = asyncio.run(self._replay(counts, file))
        run = RunInfo(
            url=root,
            started_at=started_at.isoformat(timespec="seconds"),
            trace=self.trace.path.name,
            seed=self.trace.header.seed,
            generator=self.trace.header.generator,
            options=self.options,
            requests_in_trace=total,
            interrupted=interrupted,
        )
        report = summarize(records, slo=self.slo, run=run)
        self.outputs.write(records, report)
        return report

    async def _replay(self, counts: LiveCounts, file: TextIO | None) -> tuple[list[Record], bool]:
        def on_event(event: Event) -> None:
            counts(event)
            if file is not None and event.record is not None:
                file.write(event.record.model_dump_json(exclude_defaults=True) + "\n")

        stop = asyncio.Event()
        with _interrupt_sets(stop):
            records = await replay(
                self.trace, self.url, options=self.options, api_key=self.api_key, on_event=on_event, stop=stop
            )
        return records, stop.is_set()


def _allow_many_connections() -> None:
    """Raise this process's limit of open files as far as it may: the usual 1024 would cap the requests under way."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


@contextmanager
def _interrupt_sets(stop: asyncio.Event) -> Iterator[None]:
    """SIGINT and SIGTERM set ``stop`` once; a second one does what it always does."""
    loop = asyncio.get_running_loop()

    def interrupted() -> None:
        restore()
        stop.set()

    def restore() -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, interrupted)
    try:
        yield
    finally:
        restore()


def read_records(path: Path) -> list[Record]:
    """Records that an earlier replay wrote; raises :class:`TraceInvalid` with the line's number."""
    lines = read_lines(path, TraceInvalid)
    return [parse_line(Record, line, f"{path}:{number}", TraceInvalid) for number, line in lines]
