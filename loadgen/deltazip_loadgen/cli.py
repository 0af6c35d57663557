"""The commands ``trace``, ``replay`` and ``report``."""

from collections.abc import Iterator
from contextlib import contextmanager

import typer
from pydantic import JsonValue, TypeAdapter, ValidationError
from rich.console import Console

from deltazip_loadgen import cli_options as opt
from deltazip_loadgen.errors import LoadgenError, SettingInvalid, describe
from deltazip_loadgen.generate import GeneratedTrace
from deltazip_loadgen.options import ReplayOptions
from deltazip_loadgen.prompts import PromptPool
from deltazip_loadgen.report import Slo, summarize
from deltazip_loadgen.session import Outputs, Session, read_records
from deltazip_loadgen.spec import Burst, Gamma, Poisson, TraceSpec, UniformPopularity, Weights, Zipf, parse_lengths
from deltazip_loadgen.tables import render
from deltazip_loadgen.trace import TraceFile, write_trace

INTERRUPTED = 130

app = typer.Typer(
    help="Make traces of multi-variant traffic, replay them against an OpenAI-compatible server, and report.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
)


@contextmanager
def _explained() -> Iterator[Console]:
    """A console for the command; errors that a user can act on end it in one line, without a traceback."""
    try:
        yield Console()
    except ValidationError as error:
        _fail(describe(error))
    except LoadgenError as error:
        _fail(str(error))
    except OSError as error:
        _fail(f"{error.filename or 'file'}: {error.strerror}; check the path, its permissions and the disk")


def _fail(message: str) -> None:
    Console(stderr=True, soft_wrap=True).print(f"error: {message}", style="red", markup=False, highlight=False)
    raise typer.Exit(2)


@app.command()
def trace(
    out: opt.TraceOut,
    model: opt.Models,
    rate: opt.Rate = 2.0,
    duration: opt.TraceSeconds = None,
    requests: opt.Requests = None,
    arrivals: opt.Arrivals = "poisson",
    cv: opt.Cv = 2.0,
    on: opt.OnSeconds = 5.0,
    off: opt.OffSeconds = 20.0,
    popularity: opt.Popularity = "zipf",
    zipf_s: opt.ZipfS = 1.0,
    weights: opt.WeightList = None,
    drift_every: opt.Drift = None,
    prompts: opt.Pool = None,
    endpoint: opt.EndpointChoice = "chat",
    prompt_words: opt.PromptWords = "lognormal:64:1:512",
    max_tokens: opt.MaxTokens = "lognormal:64:1:512",
    temperature: opt.Temperature = 0.0,
    seed: opt.Seed = 0,
) -> None:
    """Make a trace: who is asked what, and when.

    A minute of skewed Poisson traffic:  deltazip trace out.jsonl -m base,math,sql -r 4

    Bursts, as of many small tenants:  deltazip trace out.jsonl -m a,b,c,d --arrivals burst --on 5 --off 60

    Your own prompts, 200 requests:  deltazip trace out.jsonl -m math,sql --prompts pool.jsonl -n 200

    A line of a prompt pool is {"model": …, "messages": […]} or {"model": …, "prompt": …}, and may hold max_tokens,
    expected (the right answer, checked in the report) and tags. Without a model it serves all of them.
    """
    with _explained() as console:
        spec = TraceSpec(
            models=tuple(name for names in model for name in names.split(",")),
            rate=rate,
            duration_s=60.0 if duration is None and requests is None else duration,
            requests=requests,
            arrivals=_arrivals(arrivals, cv, on, off),
            popularity=_popularity(popularity, zipf_s, weights),
            drift_every_s=drift_every,
            endpoint=endpoint,
            prompt_words=parse_lengths(prompt_words),
            max_tokens=parse_lengths(max_tokens),
            temperature=temperature,
        )
        made = GeneratedTrace(spec, seed, PromptPool.load(prompts) if prompts else None)
        write_trace(out, made.header, made)
        done = f"{out}: {len(made)} requests to {len(spec.models)} models, seed {seed}"
        console.print(done, markup=False, highlight=False, soft_wrap=True)


@app.command()
def replay(
    trace: opt.TraceIn,
    url: opt.Url = "http://127.0.0.1:8000",
    json: opt.JsonOut = None,
    plot: opt.PlotOut = None,
    records: opt.RecordsOut = None,
    slo_ttft: opt.SloTtft = None,
    slo_tpot: opt.SloTpot = None,
    speed: opt.Speed = 1.0,
    duration: opt.SendSeconds = None,
    max_concurrency: opt.MaxConcurrency = None,
    timeout: opt.Timeout = 300.0,
    connect_timeout: opt.ConnectTimeout = 10.0,
    api_key: opt.ApiKey = None,
    extra_body: opt.ExtraBody = None,
    quiet: opt.Quiet = False,
) -> None:
    """Replay a trace against a server and report what its users would have felt.

    Requests start when the trace says, whether or not earlier ones were answered, so a slow server cannot slow
    down its own test. Ctrl-C stops and reports what was done. Ends with 1 when no request succeeded.

    Example: deltazip replay out.jsonl --url http://127.0.0.1:8000 --slo-ttft 0.5 --records records.jsonl
    """
    with _explained() as console:
        options = ReplayOptions(
            speed=speed,
            duration_s=duration,
            max_concurrency=max_concurrency,
            timeout_s=timeout,
            connect_timeout_s=connect_timeout,
            extra_body=_object(extra_body),
        )
        slo = Slo(ttft_s=slo_ttft, tpot_s=slo_tpot)
        outputs = Outputs(json, plot, records)
        report = Session(TraceFile(trace), url, options, slo, outputs, api_key).run(console, quiet=quiet)
        if not quiet:
            console.print(render(report, console.width))
    if report.run is not None and report.run.interrupted:
        raise typer.Exit(INTERRUPTED)
    if not report.total.all.ok:
        raise typer.Exit(1)


@app.command()
def report(
    records: opt.RecordsIn,
    json: opt.JsonOut = None,
    plot: opt.PlotOut = None,
    slo_ttft: opt.SloTtft = None,
    slo_tpot: opt.SloTpot = None,
) -> None:
    """Report again on the records of an earlier replay, for example with another SLO.

    Example: deltazip report records.jsonl --slo-ttft 0.2 --plot report.png
    """
    with _explained() as console:
        outputs = Outputs(json, plot)
        outputs.check()
        done = read_records(records)
        summary = summarize(done, slo=Slo(ttft_s=slo_ttft, tpot_s=slo_tpot))
        outputs.write(done, summary)
        console.print(render(summary, console.width))


def _arrivals(kind: str, cv: float, on_s: float, off_s: float) -> Poisson | Gamma | Burst:
    if kind == "burst":
        return Burst(on_s=on_s, off_s=off_s)
    return Gamma(cv=cv) if kind == "gamma" else Poisson()


def _popularity(kind: str, zipf_s: float, weights: str | None) -> UniformPopularity | Zipf | Weights:
    if kind == "weights":
        return _weights(weights)
    return Zipf(s=zipf_s) if kind == "zipf" else UniformPopularity()


def _weights(text: str | None) -> Weights:
    if text is None:
        raise SettingInvalid("--popularity weights needs --weights, one number a model, such as --weights 5,3,1")
    try:
        return Weights(values=tuple(float(part) for part in text.split(",")))
    except ValueError as error:
        raise SettingInvalid(
            f"cannot read --weights {text!r}; write positive numbers separated by commas, such as 5,3,1"
        ) from error


def _object(text: str | None) -> dict[str, JsonValue]:
    if text is None:
        return {}
    try:
        return TypeAdapter(dict[str, JsonValue]).validate_json(text)
    except ValidationError as error:
        raise SettingInvalid(f"--extra-body must be a JSON object: {describe(error)}") from error
