"""The result of the demo, as a document for scripts and a table for people."""

import importlib.metadata
import os
import platform
from collections.abc import Iterable, Mapping, Sequence

from pydantic import BaseModel, ConfigDict, Field
from rich import box
from rich.table import Table

from deltazip_deployments.demo.config import DemoConfig
from deltazip_deployments.demo.pipeline import BASE, Verdict
from deltazip_deployments.demo.traffic import QUESTION
from deltazip_loadgen import Record, summarize
from deltazip_loadgen.report import Group, Report
from deltazip_loadgen.stats import Distribution
from deltazip_ray.artifact.manifest import Manifest

_LIBRARIES = ("deltazip-ray", "torch", "transformers", "tokenizers", "safetensors", "ray", "fastapi")

_HEADINGS = (
    *("fine-\ntune", "\ndelta", "\nratio"),
    *("right:\nbase", "fine-\ntune", "\nserved"),
    *("TTFT:\ncold p50", "warm\np50", "warm\np90"),
)


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class VariantResult(_Part):
    """One variant. Times are in seconds from a request's intended start; None if there was no such request."""

    name: str
    bytes_finetuned: int = Field(description="weights of the checkpoint")
    bytes_artifact: int = Field(description="blobs of the delta")
    ratio: float
    exact_match_finetuned: float = Field(description="of the fine-tune under transformers")
    exact_match_served: float = Field(description="of the answers over HTTP")
    exact_match_base: float = Field(description="of the base under transformers, given the same input")
    ttft_cold_p50_s: float | None
    ttft_warm_p50_s: float | None
    ttft_warm_p90_s: float | None


class TrafficResult(_Part):
    """The replay as a whole."""

    requests: int
    ok: int
    errors: dict[str, int]
    window_s: float
    requests_per_s: float
    output_tokens_per_s: float
    tiers: dict[str, int] = Field(description="requests by where their delta was")
    same_as_finetuned: float = Field(description="share of the variants' answers that equal the fine-tune's own")
    mixed_steps: float = Field(description="share of the engines' steps that served more than one model at once")
    base_exact_match: float = Field(description="of the base's answers, under an instruction")
    base_ttft_p50_s: float | None
    base_ttft_p90_s: float | None


class DemoReport(_Part):
    """Everything."""

    variants: tuple[VariantResult, ...]
    traffic: TrafficResult
    stages_s: dict[str, float]
    config: DemoConfig
    machine: dict[str, str | int]
    versions: dict[str, str]


def summarized(
    config: DemoConfig,
    manifests: Mapping[str, Manifest],
    verdicts: Mapping[str, Verdict],
    records: Sequence[Record],
    mixed_steps: float,
    stages_s: Mapping[str, float],
) -> DemoReport:
    """Build the report. Shares of right answers are over the questions in the traffic."""
    replay = summarize(records)
    return DemoReport(
        variants=tuple(
            _variant(name, manifest, verdicts[name], [record for record in records if record.model == name], replay)
            for name, manifest in manifests.items()
        ),
        traffic=_traffic(replay, verdicts, records, mixed_steps),
        stages_s=dict(stages_s),
        config=config,
        machine=_machine(),
        versions={name: importlib.metadata.version(name) for name in _LIBRARIES}
        | {"python": platform.python_version()},
    )


def table(report: DemoReport) -> Table:
    """The report as a table for a terminal of 80 columns."""
    view = Table(box=box.SIMPLE_HEAD, collapse_padding=True, pad_edge=False, caption=_caption(report))
    view.caption_justify = "left"
    view.add_column("variant", no_wrap=True)
    for heading in _HEADINGS:
        view.add_column(heading, justify="right", no_wrap=True)
    for row in report.variants:
        shares = (row.exact_match_base, row.exact_match_finetuned, row.exact_match_served)
        times = (row.ttft_cold_p50_s, row.ttft_warm_p50_s, row.ttft_warm_p90_s)
        view.add_row(
            row.name,
            f"{row.bytes_finetuned / 1000:,.0f}",
            f"{row.bytes_artifact / 1000:,.0f}",
            f"{row.ratio:.2f}",
            *(f"{100 * share:.1f}" for share in shares),
            *("–" if seconds is None else f"{1000 * seconds:,.0f}" for seconds in times),
        )
    return view


def _caption(report: DemoReport) -> str:
    traffic = report.traffic
    cold = traffic.requests - traffic.tiers.get("device", 0)
    return (
        f"Codec {report.config.codec}. Sizes in kB. Right answers to held-out questions in %: base and fine-tune under "
        "transformers, and the delta over HTTP. Time to first token in ms; cold: the delta was not on the device "
        f"({cold} of {traffic.requests} requests). {traffic.requests_per_s:.1f} requests/s, "
        f"{traffic.output_tokens_per_s:.0f} tokens/s; {traffic.mixed_steps:.0%} of the steps served several models at "
        f"once. {traffic.same_as_finetuned:.1%} of the answers equal those of the uncompressed fine-tune."
    )


def _variant(
    name: str, manifest: Manifest, verdict: Verdict, records: Sequence[Record], replay: Report
) -> VariantResult:
    times = replay.variants.get(name)
    cold, warm = (None, None) if times is None else (_ttft(times.cold), _ttft(times.warm))
    return VariantResult(
        name=name,
        bytes_finetuned=manifest.bytes_finetuned,
        bytes_artifact=manifest.bytes_artifact,
        ratio=round(manifest.bytes_finetuned / manifest.bytes_artifact, 3),
        exact_match_finetuned=_share(verdict.finetuned[_question(record)] == record.expected for record in records),
        exact_match_served=_share(record.correct is True for record in records),
        exact_match_base=_share(verdict.base[_question(record)] == record.expected for record in records),
        ttft_cold_p50_s=cold and cold.p50,
        ttft_warm_p50_s=warm and warm.p50,
        ttft_warm_p90_s=warm and warm.p90,
    )


def _traffic(
    replay: Report, verdicts: Mapping[str, Verdict], records: Sequence[Record], mixed_steps: float
) -> TrafficResult:
    total = replay.total.all
    base = replay.variants[BASE].all if BASE in replay.variants else None
    same = (
        record.text.strip() == verdicts[record.model].finetuned[_question(record)]
        for record in records
        if record.model in verdicts
    )
    return TrafficResult(
        requests=total.requests,
        ok=total.ok,
        errors=total.errors,
        window_s=replay.window_s,
        requests_per_s=total.requests_per_s,
        output_tokens_per_s=total.output_tokens_per_s,
        tiers=replay.tiers,
        same_as_finetuned=_share(same),
        mixed_steps=mixed_steps,
        base_exact_match=base.exact_match if base and base.exact_match is not None else 0.0,
        base_ttft_p50_s=base.ttft_s.p50 if base and base.ttft_s else None,
        base_ttft_p90_s=base.ttft_s.p90 if base and base.ttft_s else None,
    )


def _machine() -> dict[str, str | int]:
    return {
        "platform": platform.platform(),
        "architecture": platform.machine(),
        "cores": os.cpu_count() or 1,
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
    }


def _question(record: Record) -> str:
    return record.tags[QUESTION]


def _share(hits: Iterable[bool]) -> float:
    """The share of hits; 0 if ``hits`` is empty."""
    counted = list(hits)
    return round(sum(counted) / len(counted), 6) if counted else 0.0


def _ttft(part: Group | None) -> Distribution | None:
    return part.ttft_s if part else None
