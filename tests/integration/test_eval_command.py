"""``deltazip eval`` over tiny models and tasks in local files: checkpoints and artifacts."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from deltazip_ray.artifact.artifact import open_artifact
from deltazip_ray.compress.options import CompressOptions
from deltazip_ray.compress.pipeline import compress_checkpoint
from tests.support.command import deltazip, scores
from tests.support.tasks import CHOICE, write_task
from tests.support.tiny import make_base, make_finetune

CHOICES = ["a", "b", "c", "d"]
QUESTIONS = [f"what is {first} + {second}?" for first in range(4) for second in range(3)]


def favourite(model: LlamaForCausalLM, tokenizer: Any, question: str) -> int:
    """Which choice the model thinks likeliest; each is one token."""
    ids = tokenizer(question, return_tensors="pt")["input_ids"]
    tokens = [tokenizer.convert_tokens_to_ids(choice) for choice in CHOICES]
    with torch.no_grad():
        logits = model(ids).logits[0, -1]
    return int(logits[tokens].argmax())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, a fine-tune, its artifact, and tasks whose right answers are those of the fine-tune."""
    folder = tmp_path_factory.mktemp("eval")
    base = make_base(folder / "base")
    finetuned = make_finetune(base, folder / "tuned", scale=0.1)
    options = CompressOptions(samples=8, sequence_length=24)
    compress_checkpoint(base, finetuned, (folder / "delta").as_uri(), options)
    model, tokenizer = LlamaForCausalLM.from_pretrained(finetuned), AutoTokenizer.from_pretrained(finetuned)
    rows = [
        {"question": question, "choices": CHOICES, "gold": favourite(model, tokenizer, question)}
        for question in QUESTIONS
    ]
    write_task(folder / "tasks", "letters", CHOICE, rows)
    return folder


def test_a_checkpoint_and_an_artifact_are_scored(folder: Path) -> None:
    asked = ("--tasks", "letters", "--include", folder / "tasks")
    (whole,) = scores(folder / "tuned", *asked)["scores"]
    assert (whole["name"], whole["value"], whole["samples"]) == ("letters:acc", 1.0, len(QUESTIONS))
    (base,) = scores(folder / "base", *asked)["scores"]
    assert base["value"] < 0.8
    told = scores(folder / "delta", "--base", folder / "base", *asked, "--limit", 6)
    assert told["version"] == open_artifact(folder / "delta")[0].version()
    assert told["scores"][0]["samples"] == 6
    assert told["scores"][0]["value"] >= 5 / 6


def test_recorded_scores_decide_what_is_published(folder: Path, tmp_path: Path) -> None:
    base, tuned, delta, store = folder / "base", folder / "tuned", tmp_path / "delta", tmp_path / "store"
    compress_checkpoint(base, tuned, delta.as_uri(), CompressOptions(samples=8, sequence_length=24))
    publish = ("publish", delta, store, "--name", "letters", "--require", "kl<9,letters:acc>0.5")
    code, _, told = deltazip(*publish)
    assert code == 1
    assert "has no score letters:acc, but none at all" in told
    before = open_artifact(delta)[0]
    found = scores(delta, "--base", base, "--tasks", "letters", "--include", folder / "tasks", "--record")
    manifest = open_artifact(delta)[0]
    assert found["version"] == manifest.version() != before.version()
    assert manifest.quality is not None
    assert manifest.quality.scores == {"letters:acc": found["scores"][0]["value"]}
    assert manifest.model_copy(update={"quality": before.quality}) == before
    assert deltazip(*publish)[0] == 0
    assert "letters:acc is" in deltazip(*publish[:-1], "letters:acc>1.5")[2]
    assert "letters:acc" in deltazip("inspect", delta, "--verify")[1]


def test_what_cannot_be_scored_is_told(folder: Path, tmp_path: Path) -> None:
    tasks = folder / "tasks"
    for args, hint in (
        ((folder / "delta", "--tasks", "letters"), "give its base with --base"),
        ((folder / "tuned", "--tasks", "numbers", "--include", tasks), "has letters"),
        ((folder / "tuned", "--tasks", "letters", "--record"), "--record writes into an artifact"),
        (("http://127.0.0.1:9/v1", "--tasks", "letters"), "name one with --model"),
    ):
        code, _, told = deltazip("eval", *args)
        assert code == 1
        assert hint in told.replace("\n", " ")


def test_a_folder_that_is_not_there_is_told_before_missing_options() -> None:
    code, _, told = deltazip("eval", "/nowhere")
    assert code == 2
    assert "there is no folder /nowhere" in told


def test_without_the_harness_one_is_told_how_to_get_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    code, _, told = deltazip("eval", folder / "tuned", "--tasks", "letters")
    assert code == 1
    assert "pip install 'deltazip-ray[eval]'" in told
