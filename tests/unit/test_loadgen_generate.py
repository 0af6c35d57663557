"""Traces made from a seed: reproducible to the byte, with the prompts and lengths that were asked for."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from deltazip_loadgen import GeneratedTrace, PromptPool, TraceFile, TraceSpec, write_trace
from deltazip_loadgen.errors import PoolInvalid, SettingInvalid
from deltazip_loadgen.prompts import sample_length
from deltazip_loadgen.spec import Fixed, Lengths, LogNormal, Uniform, parse_lengths

MODELS = ("base", "math", "sql")


def pool_file(path: Path) -> Path:
    lines = [
        {"model": "math", "messages": [{"role": "user", "content": f"{i}+{i}"}], "expected": str(2 * i)}
        for i in range(4)
    ]
    lines += [{"model": "sql", "prompt": f"select {i}", "max_tokens": 3, "tags": {"n": str(i)}} for i in range(3)]
    lines += [{"messages": [{"role": "user", "content": "anything"}]}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.mark.parametrize("arrivals", ["poisson", "gamma", "burst"])
def test_the_same_seed_gives_the_same_bytes_in_any_process(tmp_path: Path, arrivals: str) -> None:
    """Hash randomization and memory layout differ between processes; the files must not."""
    pool = pool_file(tmp_path / "pool.jsonl")
    options = f"-m base,math,sql -n 60 --arrivals {arrivals} --drift-every 3 --temperature 0.7 --prompts {pool}".split()
    contents = []
    for seed, hash_seed in ((7, "1"), (7, "2"), (8, "1")):
        out = tmp_path / f"{seed}-{hash_seed}.jsonl"
        command = [sys.executable, "-m", "deltazip_loadgen", "trace", str(out), *options, "--seed", str(seed)]
        subprocess.run(command, check=True, env=os.environ | {"PYTHONHASHSEED": hash_seed}, stdout=subprocess.DEVNULL)
        contents.append(out.read_bytes())
    assert contents[0] == contents[1]
    assert contents[0].splitlines()[1:] != contents[2].splitlines()[1:]


def test_the_header_makes_the_trace_again(tmp_path: Path) -> None:
    pool = PromptPool.load(pool_file(tmp_path / "pool.jsonl"))
    trace = GeneratedTrace(TraceSpec(models=MODELS, rate=3, requests=40, temperature=1.0), 11, pool)
    write_trace(tmp_path / "t", trace.header, trace)
    read = TraceFile(tmp_path / "t")
    assert read.header.requests == 40
    assert read.header.seed == 11
    again = GeneratedTrace(TraceSpec.model_validate(read.header.generator), 11, pool)
    assert again.header == read.header
    assert list(again) == list(read)
    assert read.header.generator["pool"] == {"name": "pool.jsonl", "sha256": pool.ref.sha256}


def test_iterating_twice_gives_the_same(tmp_path: Path) -> None:
    pool = PromptPool.load(pool_file(tmp_path / "pool.jsonl"))
    spec = TraceSpec(models=MODELS, rate=3, requests=40, temperature=1.0)
    for trace in (GeneratedTrace(spec, 2), GeneratedTrace(spec, 2, pool)):
        assert list(trace) == list(trace)


def test_a_pool_is_used_evenly_and_by_model(tmp_path: Path) -> None:
    pool = PromptPool.load(pool_file(tmp_path / "pool.jsonl"))
    requests = list(GeneratedTrace(TraceSpec(models=MODELS, rate=3, requests=400), 3, pool))
    math = Counter(request.messages[0].content for request in requests if request.model == "math" and request.messages)
    assert set(math) == {"0+0", "1+1", "2+2", "3+3", "anything"}
    assert max(math.values()) - min(math.values()) <= 1
    assert all(
        request.expected == str(2 * int(request.messages[0].content[0]))
        for request in requests
        if request.messages and request.messages[0].content != "anything"
    )
    sql = [request for request in requests if request.model == "sql" and request.endpoint == "completion"]
    assert {request.max_tokens for request in sql} == {3}, "a prompt's own limit wins"
    assert {request.tags["n"] for request in sql} == {"0", "1", "2"}
    assert {request.messages[0].content for request in requests if request.model == "base" and request.messages} == {
        "anything"
    }


def test_the_order_of_a_pool_is_shuffled_anew_in_each_pass(tmp_path: Path) -> None:
    path = tmp_path / "pool"
    path.write_text("".join(json.dumps({"prompt": str(i)}) + "\n" for i in range(10)))
    requests = list(GeneratedTrace(TraceSpec(models=("m",), rate=1, requests=30), 3, PromptPool.load(path)))
    passes = [tuple(request.prompt for request in requests[start : start + 10]) for start in (0, 10, 20)]
    assert all(sorted(each, key=str) == [str(i) for i in range(10)] for each in passes)
    assert len(set(passes)) == 3


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"model": "math"}', "pool:2: a prompt needs either `messages` or `prompt`"),
        ('{"prompt": "x", "expcted": "y"}', "pool:2: expcted"),
        ("{", "pool:2: "),
    ],
)
def test_a_bad_pool_line_has_its_number(tmp_path: Path, line: str, reason: str) -> None:
    path = tmp_path / "pool"
    path.write_text('{"prompt": "x"}\n' + line + "\n")
    with pytest.raises(PoolInvalid, match=reason):
        PromptPool.load(path)


def test_a_model_without_prompts_is_named(tmp_path: Path) -> None:
    path = tmp_path / "pool"
    path.write_text('{"model": "math", "prompt": "x"}\n')
    with pytest.raises(PoolInvalid, match="no prompt for model 'sql'"):
        GeneratedTrace(TraceSpec(models=("math", "sql"), rate=1, requests=1), 0, PromptPool.load(path))


def test_random_prompts_have_their_length_in_words() -> None:
    spec = TraceSpec(models=("m",), rate=1, requests=20, prompt_words=Fixed(value=9), endpoint="completion")
    prompts = [request.prompt or "" for request in GeneratedTrace(spec, 0)]
    assert {len(prompt.split()) for prompt in prompts} == {9}
    assert len(set(prompts)) == 20


def test_sampling_seeds_only_when_there_is_sampling() -> None:
    spec = TraceSpec(models=("m",), rate=1, requests=20)
    assert {request.seed for request in GeneratedTrace(spec, 0)} == {None}
    sampled = GeneratedTrace(spec.model_copy(update={"temperature": 0.5}), 0)
    assert len({request.seed for request in sampled}) == 20


def sample(law: Lengths, count: int = 20_000) -> np.ndarray:
    rng = np.random.default_rng(2)
    return np.array([sample_length(law, rng) for _ in range(count)])


def test_length_laws() -> None:
    assert set(sample(Fixed(value=5), 10)) == {5}
    assert set(sample(Uniform(low=3, high=6))) == {3, 4, 5, 6}
    drawn = sample(LogNormal(mean=100, cv=0.5, high=100_000))
    assert drawn.mean() == pytest.approx(100, rel=0.02)
    assert drawn.std() / drawn.mean() == pytest.approx(0.5, rel=0.04)
    clipped = sample(LogNormal(mean=10, cv=3, high=40))
    assert (clipped.min(), clipped.max()) == (1, 40)


def test_lengths_are_parsed_and_what_cannot_be_is_explained() -> None:
    assert parse_lengths("64") == Fixed(value=64)
    assert parse_lengths("uniform:16:256") == Uniform(low=16, high=256)
    assert parse_lengths("lognormal:100:0.8:512") == LogNormal(mean=100, cv=0.8, high=512)
    for text in (
        "",
        "abc",
        "64:2",
        "uniform:1",
        "uniform:a:b",
        "lognormal:1:1",
        "uniform:9:1",
        "-3",
        "lognormal:nan:1:9",
    ):
        with pytest.raises(SettingInvalid, match="lengths"):
            parse_lengths(text)
