"""The whole path: what the server says over HTTP is, token by token, what transformers says with the merged weights.

Compressed by the real compressor, stored in a real S3 server, served by a real Ray Serve application, asked by the
real ``openai`` client. There are more versions than slots, so some are evicted and loaded again.
"""

import asyncio
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import openai
import pytest
from transformers import PreTrainedTokenizerFast

from deltazip_deployments.serving import running
from deltazip_ray.artifact.artifact import open_artifact
from deltazip_ray.artifact.catalog import Catalog
from deltazip_ray.artifact.store import open_store
from deltazip_ray.compress.merge import merge
from deltazip_ray.compress.options import CompressOptions
from deltazip_ray.compress.pipeline import compress_checkpoint
from deltazip_ray.config import AppConfig, EngineConfig, StoreConfig
from tests.support.oracle import Oracle
from tests.support.s3 import S3Server, free_ports
from tests.support.serve_app import wait_until
from tests.support.tiny import make_base, make_finetune

TEMPLATE = "{% for m in messages %}[{{ m['content'] }}<go>]{% endfor %}{% if add_generation_prompt %}:{% endif %}"
CODECS = {"four": "int4", "two": "int2", "sparse": "sparse24_int4", "added": "int4", "three": "int3", "one": "int1"}
PROMPTS = ("sort dcba", "reverse abc", "0123 + 4567 =", "Q: why?", "hello there, how are you?", "x")
TOKENS = 24
CANCELLED = r'deltazip_engine_requests_total.*outcome="aborted"'


@dataclass(frozen=True)
class Zoo:
    """A served zoo and what each of its models would say."""

    url: str
    oracles: dict[str, Oracle]
    tokenizers: dict[str, PreTrainedTokenizerFast]

    def completion(self, model: str, prompt: str, count: int = TOKENS) -> str:
        """The oracle's greedy answer to a plain prompt."""
        return self._say(model, self.tokenizers[model](prompt).input_ids, count)

    def chat(self, model: str, content: str, count: int = TOKENS) -> str:
        """The oracle's greedy answer to one user message, through the model's own template."""
        messages = [{"role": "user", "content": content}]
        ids = self.tokenizers[model].apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        return self._say(model, ids, count)

    def client(self) -> openai.AsyncOpenAI:
        """The real client; no retries, so that nothing hides."""
        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)

    def metric(self, pattern: str) -> float:
        """Sum of the samples whose line matches."""
        text = httpx.get(f"{self.url}/metrics").text
        return sum(float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if re.match(pattern, line))

    def _say(self, model: str, ids: list[int], count: int) -> str:
        tokenizer = self.tokenizers[model]
        tokens = self.oracles[model].greedy(ids, count)
        if tokenizer.eos_token_id in tokens:
            tokens = tokens[: tokens.index(tokenizer.eos_token_id)]
        return str(tokenizer.decode(tokens, skip_special_tokens=True))


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory, s3_server: S3Server) -> Iterator[Zoo]:
    folder = tmp_path_factory.mktemp("equivalence")
    base = make_base(folder / "base")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in s3_server.environment.items():
            patch.setenv(name, value)
        store = StoreConfig(url=f"s3://{s3_server.new_bucket()}/deltas", path_style=True)
        folders = {"base": base}
        for seed, (name, codec) in enumerate(CODECS.items(), start=1):
            folders[name] = _publish(base, folder, store, name, codec, seed)
        config = AppConfig(
            base=str(base),
            store=store,
            engine=EngineConfig(slots=4, threads=1, max_model_len=256, max_batch_tokens=48, kv_blocks=192),
        )
        with running(config, port=free_ports(1)[0]) as url:
            oracles = {name: Oracle(path) for name, path in folders.items()}
            yield Zoo(url, oracles, {n: PreTrainedTokenizerFast.from_pretrained(p) for n, p in folders.items()})


def _publish(base: Path, folder: Path, store: StoreConfig, name: str, codec: str, seed: int) -> Path:
    """Fine-tune, compress and publish; returns the merged checkpoint."""
    special = {"added": ("<go>",), "template": TEMPLATE} if name == "added" else {}
    tuned = make_finetune(base, folder / f"{name}-tuned", seed=seed, scale=0.05, **special)
    artifact = folder / f"{name}-artifact"
    options = CompressOptions(codec=codec, samples=8, sequence_length=32)
    compress_checkpoint(base, tuned, artifact.as_uri(), options)
    merge(base, artifact, folder / name)
    manifest, source = open_artifact(artifact)
    Catalog(open_store(store), manifest.base.digest).publish(source, manifest, name)
    return folder / name


async def _ask(client: openai.AsyncOpenAI, model: str, prompt: str) -> str:
    answer = await client.completions.create(model=model, prompt=prompt, max_tokens=TOKENS, temperature=0)
    return answer.choices[0].text


async def _ask_streaming(client: openai.AsyncOpenAI, model: str, content: str) -> str:
    stream = await client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": content}],
        max_tokens=TOKENS,
        temperature=0,
        stream=True,
    )
    return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])


async def test_five_models_share_batches_and_answer_as_alone(zoo: Zoo) -> None:
    models = ("base", "four", "two", "sparse", "added")
    wanted = {(model, prompt): zoo.completion(model, prompt) for model in models for prompt in PROMPTS}
    assert len({wanted[model, PROMPTS[0]] for model in models}) == len(models), (
        "the models must differ to be told apart"
    )

    def shared() -> bool:
        steps = zoo.metric(r"deltazip_engine_step_versions_count")
        of_five_versions = zoo.metric(r'deltazip_engine_step_versions_bucket.*le="4\.0"') < steps
        of_more_than_eight_rows = zoo.metric(r'deltazip_engine_step_rows_bucket.*le="8\.0"') < steps
        return of_five_versions and of_more_than_eight_rows

    async with asyncio.timeout(60), zoo.client() as client:
        await asyncio.gather(*(_ask(client, model, "warm up") for model in models))
        while True:  # which requests meet in a step is chance
            answers = await asyncio.gather(*(_ask(client, model, prompt) for model, prompt in wanted))
            assert dict(zip(wanted, answers, strict=True)) == wanted
            if await asyncio.to_thread(shared):
                break


async def test_chat_uses_each_variants_own_template_and_tokens(zoo: Zoo) -> None:
    wanted = {(model, prompt): zoo.chat(model, prompt) for model in ("base", "two", "added") for prompt in PROMPTS}
    async with zoo.client() as client:
        answers = await asyncio.gather(*(_ask_streaming(client, model, prompt) for model, prompt in wanted))
    assert dict(zip(wanted, answers, strict=True)) == wanted


async def test_versions_answer_the_same_after_eviction_and_reload(zoo: Zoo) -> None:
    variants = tuple(CODECS)
    wanted = {(model, prompt): zoo.completion(model, prompt) for model in variants for prompt in PROMPTS[:3]}
    before = zoo.metric(r"deltazip_engine_evictions_total")
    async with zoo.client() as client:
        for _ in range(2):
            answers = await asyncio.gather(*(_ask(client, model, prompt) for model, prompt in wanted))
            assert dict(zip(wanted, answers, strict=True)) == wanted
    # Metrics come with the heartbeats.
    wanted_evictions = before + len(variants) - 4
    await asyncio.to_thread(
        wait_until, lambda: zoo.metric(r"deltazip_engine_evictions_total") >= wanted_evictions, timeout_s=20
    )


async def test_a_request_cancelled_in_the_middle_leaves_others_alone_and_nothing_behind(zoo: Zoo) -> None:
    wanted = {(model, prompt): zoo.completion(model, prompt) for model in ("base", "four") for prompt in PROMPTS}
    before = zoo.metric(CANCELLED)
    async with zoo.client() as client:

        async def leave_early() -> None:
            stream = await client.completions.create(
                model="four",
                prompt="endless",
                max_tokens=200,
                temperature=0,
                stream=True,
                extra_body={"ignore_eos": True},
            )
            async with stream:
                async for _ in stream:
                    return

        others = asyncio.gather(*(_ask(client, model, prompt) for model, prompt in wanted))
        await asyncio.gather(*(leave_early() for _ in range(4)))
        assert dict(zip(wanted, await others, strict=True)) == wanted

    def all_is_given_back() -> bool:
        held = ("kv_blocks_used", "running_requests", "waiting_requests")
        return zoo.metric(CANCELLED) > before and not any(zoo.metric(f"deltazip_engine_{what}") for what in held)

    await asyncio.to_thread(wait_until, all_is_given_back, timeout_s=20)


async def test_first_use_is_cold_and_the_next_is_warm(zoo: Zoo) -> None:
    async with httpx.AsyncClient(base_url=zoo.url, timeout=60) as client:

        async def tier(model: str) -> str:
            body = {"model": model, "prompt": "abc", "max_tokens": 1}
            return (await client.post("/v1/completions", json=body)).headers["x-deltazip-tier"]

        # Six in four slots: whoever has to leave, not all are there, and each is once it was asked for.
        firsts = []
        for model in CODECS:
            firsts.append(await tier(model))
            assert await tier(model) == "device"
        assert set(firsts) <= {"host", "device"}
        assert firsts.count("host") >= len(CODECS) - 4
        assert await tier("base") == "device"


async def test_several_structured_outputs_in_a_version_with_a_tokenizer_of_its_own(zoo: Zoo) -> None:
    async with zoo.client() as client:
        answer = await client.chat.completions.create(
            model="added",
            messages=[{"role": "user", "content": "hi"}],
            n=3,
            seed=1,
            temperature=1.5,
            max_tokens=60,
            logprobs=True,
            frequency_penalty=0.5,
            extra_body={"structured_outputs": {"regex": "(<go>|[a-c]){12}"}},
        )
    texts = [choice.message.content for choice in answer.choices]
    assert all(re.fullmatch("(<go>|[a-c]){12}", text) for text in texts), texts
    assert len(set(texts)) == 3
    for choice in answer.choices:
        assert "".join(entry.token for entry in choice.logprobs.content) == f"{choice.message.content}<eos>"
