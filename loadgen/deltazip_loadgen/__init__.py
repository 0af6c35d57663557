"""Traces, arrivals and an open-loop client for multi-variant endpoints."""

from deltazip_loadgen.errors import LoadgenError
from deltazip_loadgen.generate import GeneratedTrace
from deltazip_loadgen.options import ReplayOptions
from deltazip_loadgen.prompts import PromptPool
from deltazip_loadgen.record import Record
from deltazip_loadgen.replay import Event, replay
from deltazip_loadgen.report import Report, Slo, summarize
from deltazip_loadgen.spec import TraceSpec
from deltazip_loadgen.trace import TraceFile, TraceHeader, TraceRequest, write_trace

__all__ = [
    "Event",
    "GeneratedTrace",
    "LoadgenError",
    "PromptPool",
    "Record",
    "ReplayOptions",
    "Report",
    "Slo",
    "TraceFile",
    "TraceHeader",
    "TraceRequest",
    "TraceSpec",
    "replay",
    "summarize",
    "write_trace",
]
