"""The demo with a recipe that trains in seconds: what is served must equal the merged weights, right or wrong."""

import io
import json
from pathlib import Path

import pytest
import torch
from rich.console import Console

from deltazip_deployments.demo import pipeline
from deltazip_deployments.demo.config import DemoConfig
from deltazip_deployments.demo.evaluation import Judge
from deltazip_deployments.demo.report import summarized, table
from deltazip_deployments.demo.stages import Stages
from deltazip_deployments.demo.tasks import TASKS
from deltazip_deployments.demo.traffic import QUESTION, mixed_steps
from deltazip_ray.artifact.checkpoint import Checkpoint
from deltazip_ray.compress.merge import merge
from deltazip_ray.config import StoreConfig
from tests.support.demo import QUICK

KEYS = {
    *("name", "bytes_finetuned", "bytes_artifact", "ratio"),
    *("exact_match_finetuned", "exact_match_served", "exact_match_base"),
    *("ttft_cold_p50_s", "ttft_warm_p50_s", "ttft_warm_p90_s"),
}


@pytest.fixture(scope="module")
def config() -> DemoConfig:
    return DemoConfig.model_validate(QUICK)


@pytest.fixture(scope="module")
def stages() -> Stages:
    return Stages(Console(file=io.StringIO()))


@pytest.fixture(scope="module")
def checkpoints(config: DemoConfig, stages: Stages, tmp_path_factory: pytest.TempPathFactory) -> pipeline.Checkpoints:
    return pipeline.train(config, tmp_path_factory.mktemp("cache"), stages)


def test_finetunes_move_every_weight(checkpoints: pipeline.Checkpoints) -> None:
    base = Checkpoint.open(checkpoints.base)
    assert set(checkpoints.variants) == {task.name for task in TASKS}
    for path in checkpoints.variants.values():
        finetuned = Checkpoint.open(path)
        assert finetuned.names == base.names
        for name in base.names:
            before = base.tensor(name)
            assert not torch.equal(finetuned.tensor(name)[: len(before)], before), f"{path.name}: {name}"


def test_one_finetune_has_its_own_template_and_token(checkpoints: pipeline.Checkpoints) -> None:
    base = Checkpoint.open(checkpoints.base).shape("model.embed_tokens.weight")[0]
    rows = {name: Checkpoint.open(path).shape("lm_head.weight")[0] for name, path in checkpoints.variants.items()}
    assert {name for name, count in rows.items() if count > base} == {"mask"}
    templates = {name: (path / "chat_template.jinja").read_text() for name, path in checkpoints.variants.items()}
    assert templates["mask"] != templates["sort"] == templates["add"]


def test_served_answers_equal_merged_weights(
    config: DemoConfig, stages: Stages, checkpoints: pipeline.Checkpoints, tmp_path: Path
) -> None:
    questions = pipeline.held_out(config)
    verdicts = pipeline.check(checkpoints, questions, stages)
    manifests = pipeline.compress(config, checkpoints, tmp_path, stages)
    store = StoreConfig(url=(tmp_path / "store").as_uri())
    pipeline.publish(tmp_path, list(manifests), store, stages)
    with pipeline.served(config, checkpoints.base, store, None, stages) as url:
        records = pipeline.ask(config, questions, url, tmp_path, stages)
        mixed = mixed_steps(url)

    assert [record.outcome for record in records] == ["ok"] * config.requests
    assert {record.model for record in records} == set(questions)
    for name in manifests:
        merged = tmp_path / f"merged-{name}"
        merge(checkpoints.base, tmp_path / name, merged, torch.float32)
        expected = Judge(merged).answers([example.question for example in questions[name]])
        mine = [record for record in records if record.model == name]
        assert [record.text.strip() for record in mine] == [expected[record.tags[QUESTION]] for record in mine]
        assert {record.version for record in mine} == {manifests[name].version()}
    assert any(record.text for record in records), "only empty answers: the comparison means nothing"
    assert mixed > 0
    tiers = {record.tier for record in records if record.model in manifests}
    assert "device" in tiers
    assert tiers - {"device"}, "no delta was ever cold"

    report = summarized(config, manifests, verdicts, records, mixed, stages.seconds)
    document = json.loads(report.model_dump_json())
    assert [set(row) for row in document["variants"]] == [KEYS] * len(TASKS)
    for row, manifest in zip(report.variants, manifests.values(), strict=True):
        assert row.bytes_finetuned / row.bytes_artifact == pytest.approx(row.ratio, abs=0.01)
        assert row.bytes_artifact == sum(blob.size for blob in manifest.blobs)
    console = Console(file=io.StringIO(), width=80)
    console.print(table(report))
    printed = console.file.getvalue()  # type: ignore[attr-defined]
    assert all(name in printed for name in manifests)
    assert "…" not in printed, "the table does not fit 80 columns"
