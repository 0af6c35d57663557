"""The quality proof in small: real training, real compression, every line of the results."""

import json
from pathlib import Path

import pytest

from benchmarks.quality import measure, report
from benchmarks.quality.measure import Bench, Job
from benchmarks.quality.models import BASE, Trainer, trained
from benchmarks.quality.prepare import Prepared, prepare
from benchmarks.quality.scales import TINY
from benchmarks.quality.tasks import TASKS
from benchmarks.quality.training import new_model
from deltazip_deployments.demo.checkpoints import CheckpointCache

TASK = "rewrite"
MEASURED = (
    "fine-tune",
    "base",
    "ours, ratio 10",
    "ours, int4 for all",
    "rounded int1",
    "BitDelta",
    "low rank + residue, bytes of int1",
    "GPTQ int3",
    "LoRA",
)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> CheckpointCache:
    """A base, a fine-tune and an adapter that learned next to nothing."""
    cache = CheckpointCache(tmp_path_factory.mktemp("quality"), "tiny")
    cache.get("data", lambda folder: prepare(folder, TINY, 1))
    trainer = Trainer(new_model(TINY, "cpu", 0), Prepared(cache.path("data")), TINY, cache)
    for path in (trainer.base(), trainer.finetune(TASK), trainer.adapter(TASK)):
        assert trained(path)["loss"] > 0
    return cache


def test_every_form_is_measured(cache: CheckpointCache, tmp_path: Path) -> None:
    bench = Bench(job(cache, tmp_path), TASK)
    rows = {name: bench.row(name) for name in MEASURED}
    for row in rows.values():
        json.dumps(row)
    assert rows["fine-tune"]["on_task"]["kl"] == 0
    assert rows["fine-tune"]["ratio_gpu"] == 1
    assert rows[BASE]["bytes_gpu"] == 0
    divergence = {name: row["on_task"]["kl"] for name, row in rows.items()}
    assert divergence["ours, int4 for all"] < divergence["ours, ratio 10"] < divergence["rounded int1"]
    assert divergence["BitDelta"] < divergence[BASE]
    assert rows["ours, ratio 10"]["ratio_gpu"] >= 10
    assert all(row["bytes_stored"] <= row["bytes_gpu"] for row in rows.values())
    learned = [row | {"exact_match": 0.5 + row["exact_match"] / 2} for row in rows.values()]
    assert report.summarize(learned) == []
    learned[0]["exact_match"] = 0.9
    lines = report.summarize(learned)
    assert [line.name for line in lines[:2]] == ["fine-tune", "base"]
    assert report.table(lines).count("\n") == 1 + len(MEASURED)


def test_nothing_is_begun_after_the_deadline(cache: CheckpointCache, tmp_path: Path) -> None:
    late = job(cache, tmp_path, deadline=0.0)
    measure.measure(late)
    assert not late.out.exists()


def test_a_second_run_measures_what_the_first_has_not(cache: CheckpointCache, tmp_path: Path) -> None:
    forms = ("base", "fine-tune")
    again = job(cache, tmp_path, forms)
    again.out.write_text("".join(json.dumps({"task": TASK, "variant": name}) + "\n" for name in forms[:1]))
    measure.measure(again)
    rows = [json.loads(line) for line in again.out.read_text().splitlines()]
    assert tuple(row["variant"] for row in rows) == forms


def job(cache: CheckpointCache, folder: Path, forms: tuple[str, ...] = (), deadline: float = float("inf")) -> Job:
    return Job((TASK,), forms, "tiny", cache.folder, folder / "rows", folder / "scratch", "cpu", deadline)


@pytest.mark.parametrize(
    ("task", "question", "answer"),
    [
        ("json", '{"id":"ab","user":{"name":"xy","city":"q"},"tag":7} user.city', "q"),
        ("json", '{"id":"ab","user":{"name":"xy","city":"q"},"tag":7} tag', "7"),
        ("sort", "83 12 570 9 40", "9 12 40 83 570"),
        ("rewrite", "get_user(file_path, max_row)", "getUser(maxRow, filePath)"),
        ("table", "name,id,tag;xy,7,ab", "id=7 name=xy tag=ab"),
    ],
)
def test_answers(task: str, question: str, answer: str) -> None:
    assert TASKS[task].answer(question) == answer


def test_the_made_up_language_has_a_word_of_its_own_for_each() -> None:
    answer = TASKS["translate"].answer
    subject, adjective, thing, other, verb = answer("small dog sees big cat").split()
    assert len({subject, adjective, thing, other, verb}) == 5
    assert answer("big cat sees small dog").split() == [thing, other, subject, adjective, verb]
