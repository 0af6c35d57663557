"""The commands' options as types, so that the commands themselves stay readable."""

from pathlib import Path
from typing import Annotated, Literal

import typer

_WHO, _WHEN, _WHAT = "Whom", "When", "What they ask"
_OUT, _PACE = "Results", "Pace and patience"

# trace
TraceOut = Annotated[Path, typer.Argument(metavar="OUT", help="File to write, one JSON object a line.")]
Models = Annotated[
    list[str],
    typer.Option(
        "--model", "-m", rich_help_panel=_WHO, help="A model name, most popular first; repeat, or separate by commas."
    ),
]
Popularity = Annotated[
    Literal["zipf", "uniform", "weights"],
    typer.Option(rich_help_panel=_WHO, help="How requests spread over the models."),
]
ZipfS = Annotated[
    float,
    typer.Option(
        "--zipf-s", rich_help_panel=_WHO, help="zipf: the model of rank r gets a share ∝ r^-s; larger is more skewed."
    ),
]
WeightList = Annotated[
    str | None,
    typer.Option(
        "--weights", metavar="W,W,…", rich_help_panel=_WHO, help="weights: one number a model, separated by commas."
    ),
]
Drift = Annotated[
    float | None,
    typer.Option("--drift-every", metavar="S", rich_help_panel=_WHO, help="Permute the models' ranks every S seconds."),
]
Rate = Annotated[
    float, typer.Option("--rate", "-r", rich_help_panel=_WHEN, help="Mean requests per second, all models together.")
]
TraceSeconds = Annotated[
    float | None,
    typer.Option(
        "--duration",
        "-d",
        metavar="S",
        rich_help_panel=_WHEN,
        help="Length of the trace; 60 when --requests is not given.",
    ),
]
Requests = Annotated[
    int | None,
    typer.Option(
        "--requests", "-n", metavar="N", rich_help_panel=_WHEN, help="Number of requests, instead of --duration."
    ),
]
Arrivals = Annotated[
    Literal["poisson", "gamma", "burst"],
    typer.Option(
        rich_help_panel=_WHEN,
        help="poisson: independent. gamma: gaps with variation --cv. "
        "burst: each model on and off on its own, as in the Azure functions traces.",
    ),
]
Cv = Annotated[
    float,
    typer.Option(
        rich_help_panel=_WHEN, help="gamma: standard deviation over mean of the gaps; 1 is Poisson, more is burstier."
    ),
]
OnSeconds = Annotated[
    float, typer.Option("--on", metavar="S", rich_help_panel=_WHEN, help="burst: mean length of a burst.")
]
OffSeconds = Annotated[
    float, typer.Option("--off", metavar="S", rich_help_panel=_WHEN, help="burst: mean pause between bursts.")
]
Pool = Annotated[
    Path | None,
    typer.Option(
        "--prompts",
        metavar="FILE",
        rich_help_panel=_WHAT,
        help="JSON lines of prompts to draw from, by model; random words when absent.",
    ),
]
EndpointChoice = Annotated[
    Literal["chat", "completion"],
    typer.Option(
        "--endpoint",
        rich_help_panel=_WHAT,
        help="Endpoint of random-word prompts; a pool's lines decide for themselves.",
    ),
]
PromptWords = Annotated[
    str,
    typer.Option(
        metavar="LENGTHS",
        rich_help_panel=_WHAT,
        help="Words of a random prompt: 64, uniform:16:256 or lognormal:MEAN:CV:MAX.",
    ),
]
MaxTokens = Annotated[
    str,
    typer.Option(metavar="LENGTHS", rich_help_panel=_WHAT, help="Output limit of each request, written the same way."),
]
Temperature = Annotated[
    float, typer.Option(rich_help_panel=_WHAT, help="0 is greedy; above, every request gets a sampling seed.")
]
Seed = Annotated[int, typer.Option(min=0, help="The same seed and settings give the same bytes.")]

# replay
TraceIn = Annotated[Path, typer.Argument(metavar="TRACE", help="A file that `trace` made, or one in its format.")]
Url = Annotated[str, typer.Option(help="The OpenAI-compatible server, with or without /v1.")]
JsonOut = Annotated[Path | None, typer.Option("--json", metavar="FILE", rich_help_panel=_OUT, help="Write the report.")]
PlotOut = Annotated[
    Path | None,
    typer.Option(
        "--plot",
        metavar="FILE",
        rich_help_panel=_OUT,
        help="Draw it: PNG, or SVG or PDF by its name (needs matplotlib).",
    ),
]
RecordsOut = Annotated[
    Path | None,
    typer.Option(
        "--records", metavar="FILE", rich_help_panel=_OUT, help="Write every request's record as it ends, one a line."
    ),
]
SloTtft = Annotated[
    float | None,
    typer.Option(metavar="S", rich_help_panel=_OUT, help="Goodput counts answers whose first token took at most this."),
]
SloTpot = Annotated[
    float | None,
    typer.Option(metavar="S", rich_help_panel=_OUT, help="… and whose further tokens took at most this each."),
]
Speed = Annotated[float, typer.Option(rich_help_panel=_PACE, help="2 replays the trace in half its time.")]
SendSeconds = Annotated[
    float | None,
    typer.Option(
        "--duration",
        metavar="S",
        rich_help_panel=_PACE,
        help="Start no request after S seconds; wait for those under way.",
    ),
]
MaxConcurrency = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        rich_help_panel=_PACE,
        help="At most N requests at once. Requests then wait for each other, and the report says so.",
    ),
]
Timeout = Annotated[float, typer.Option(metavar="S", rich_help_panel=_PACE, help="Time for a whole request.")]
ConnectTimeout = Annotated[float, typer.Option(metavar="S", rich_help_panel=_PACE, help="Time to make a connection.")]
ApiKey = Annotated[
    str | None, typer.Option(envvar="DELTAZIP_API_KEY", help="Sent as a bearer token; never written anywhere.")
]
ExtraBody = Annotated[
    str | None,
    typer.Option(metavar="JSON", help="""An object merged into every request, such as '{"ignore_eos": true}'."""),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar and no table.")]

# report
RecordsIn = Annotated[Path, typer.Argument(metavar="RECORDS", help="A file that `replay --records` wrote.")]
