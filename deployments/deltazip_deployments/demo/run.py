"""One run of the demo, from training to the report."""

import signal
import tempfile
from pathlib import Path

import torch
import transformers

from deltazip_deployments.demo import pipeline
from deltazip_deployments.demo.config import DemoConfig
from deltazip_deployments.demo.hints import hints
from deltazip_deployments.demo.report import DemoReport, summarized, table
from deltazip_deployments.demo.stages import Stages
from deltazip_deployments.demo.traffic import mixed_steps
from deltazip_ray.cli.console import err, out
from deltazip_ray.config import StoreConfig
from deltazip_ray.errors import EngineError


def run(config: DemoConfig, cache: Path, *, port: int | None, keep: bool, json: Path | None) -> None:
    """Train, or use the models in ``cache``; serve on ``port``, print the report and write it to ``json``.

    With ``keep`` the server stays until Ctrl-C. Raises EngineError if a request failed, and the errors of the stages.
    """
    transformers.utils.logging.disable_progress_bar()
    # Everything except training is too small for a second thread.
    torch.set_num_threads(1)
    questions = pipeline.held_out(config)
    with tempfile.TemporaryDirectory(prefix="deltazip-demo-") as scratch, Stages(err) as stages:
        folder = Path(scratch)
        store = StoreConfig(url=(folder / "store").as_uri())
        checkpoints = pipeline.train(config, cache, stages)
        verdicts = pipeline.check(checkpoints, questions, stages)
        manifests = pipeline.compress(config, checkpoints, folder, stages)
        pipeline.publish(folder, list(manifests), store, stages)
        with pipeline.served(config, checkpoints.base, store, port, stages) as url:
            records = pipeline.ask(config, questions, url, folder, stages)
            report = summarized(config, manifests, verdicts, records, mixed_steps(url), stages.seconds)
            stages.pause()
            _show(report, json)
            if keep:
                out.print(hints(url, questions), markup=False, highlight=False, soft_wrap=True)
                signal.pause()
    if report.traffic.errors:
        raise EngineError(f"{report.traffic.requests - report.traffic.ok} requests failed: {report.traffic.errors}")


def _show(report: DemoReport, json: Path | None) -> None:
    if json is not None:
        json.write_text(report.model_dump_json(indent=2) + "\n", encoding="utf-8")
    out.print(table(report))
