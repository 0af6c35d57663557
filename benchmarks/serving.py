"""``python -m benchmarks.serving --json FILE``: the whole system with its own commands, on one machine.

Random checkpoints are compressed, published and served under Ray Serve; answers are compared with transformers on
merged weights; a bursty trace over more variants than slots is replayed; the replica is killed under load; SIGTERM
ends it all.
"""

import argparse
import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import torch
import yaml
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.serving_clients import Answers, answers, kill_under_load
from benchmarks.serving_models import LLAMAS, Judge, make_models
from benchmarks.serving_run import COMMAND, MARK, Run, processes
from benchmarks.serving_streams import measure
from deltazip_ray.config import MIB

_BEAT_S = 1.2
"""The router knows a replica's figures within that time."""
SEEDS = 0, 5
"""Of the two traces. Both ask for all variants, which not every seed does."""
OUTER_CODEC = "int4"
"""Of embedding and head, whatever the rest is in."""
STREAMS_S, STREAM_TOKENS = 4.0, 900
CODECS = ("int2", "int4", "int2", "sparse24_int4", "int3", "int1")


def publish(run: Run, samples: int) -> None:
    """Compress and publish the fine-tunes while the server runs, and write base + delta for the judges."""

    def one(index: int) -> dict[str, Any]:
        name = run.variants[index]
        paths = run.folder / "base", run.folder / name
        options = ["--codec", CODECS[index % len(CODECS)], "--samples", samples, "--sequence-length", 64]
        out = run.command("compress", *paths, "--out", paths[1] / "delta", *options, "--device", run.device, "--json")
        run.command("publish", paths[1] / "delta", run.folder / "store", "--name", name)
        run.command("merge", paths[0], paths[1] / "delta", "--out", paths[1] / "merged")
        told = json.loads(out)
        return {"name": name, "codec": CODECS[index % len(CODECS)], "ratio": told["ratio"]}

    with ThreadPoolExecutor(len(run.variants)) as pool:
        run.report["variants"] = list(pool.map(one, range(len(run.variants))))


def wait_for_all(run: Run, timeout_s: float = 30.0) -> None:
    """Until the server offers every variant."""
    deadline = time.monotonic() + timeout_s
    offered: set[str] = set()
    while offered != set(run.models):
        if time.monotonic() > deadline:
            raise SystemExit(f"the server offers {sorted(offered)} after {timeout_s:g} s")
        time.sleep(0.2)
        offered = {one["id"] for one in httpx.get(f"{run.url}/v1/models", timeout=10).json()["data"]}


def settings(run: Run, slots: int) -> dict[str, Any]:
    """The application's: fewer slots than variants."""
    engine = {"device": run.device, "slots": slots, "max_model_len": 1024, "max_running": 256}
    if run.device == "cuda":
        # What is not prepared at the start waits for compilers: minutes on a machine that never had it.
        codecs = sorted({*CODECS[: len(run.variants)], OUTER_CODEC})
        engine |= {"dtype": "bfloat16", "kv_blocks": 16384, "max_batch_tokens": 2048}
        engine |= {"warm_codecs": codecs, "load_timeout_s": 170}
    return {
        "base": str(run.folder / "base"),
        "base_name": "base",
        "store": {"url": (run.folder / "store").as_uri()},
        "engine": engine,
        "node_store": {
            "arena_bytes": (64 if run.shape == "tiny" else 4096) * MIB,
            "disk_dir": str(run.folder / "disk"),
        },
    }


@contextlib.contextmanager
def serving(run: Run, slots: int) -> Iterator[subprocess.Popen[bytes]]:
    """``deltazip serve``, ended by SIGTERM; afterwards nothing of it may be left."""
    config, log = run.folder / "serve.yaml", run.folder / "serve.log"
    config.write_text(yaml.safe_dump(settings(run, slots)))
    command = [*COMMAND, "serve", "--config", str(config), "--port", str(run.port)]
    own = os.environ | {MARK: str(run.folder)}
    with log.open("w") as out:
        server = subprocess.Popen(command, stdout=out, stderr=out, start_new_session=True, env=own)
    try:
        yield server
    finally:
        with run.stage("SIGTERM"):
            server.send_signal(signal.SIGTERM)
            run.report["exit_code"] = server.wait(60)
        run.report["processes_left"] = len(processes(run.folder))


def wait_until_healthy(run: Run, server: subprocess.Popen[bytes], timeout_s: float = 300.0) -> None:
    """Until the server says that it can answer."""
    deadline = time.monotonic() + timeout_s
    while True:
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(f"{run.url}/health", timeout=5).status_code == 200:
                return
        if server.poll() is not None or time.monotonic() > deadline:
            raise SystemExit(f"the server does not answer:\n{(run.folder / 'serve.log').read_text()[-5000:]}")
        time.sleep(0.2)


def judge(run: Run, found: Answers) -> dict[str, dict[str, float]]:
    """The largest regret of each model's answers under its own merged weights, and the least under the base's."""
    regret = {}
    judges = {"base": Judge(run.folder / "base", run.device)}
    for model, pairs in found.items():
        if model not in judges:
            judges = {"base": judges["base"], model: Judge(run.folder / model / "merged", run.device)}
        own = [judges[model].regret(*pair) for pair in pairs]
        base = [judges["base"].regret(*pair) for pair in pairs]
        regret[model] = {"own": round(max(own), 4), "base": round(min(base), 4)}
    return regret


def replay(run: Run, rate: float, duration: float, seed: int) -> dict[str, Any]:
    """A bursty trace over all models, by the load generator's commands."""
    trace, out = run.folder / "trace.jsonl", run.folder / "replay.json"
    names = ",".join(run.models)
    shape = ["--arrivals", "burst", "--off", 5, "--seed", seed]
    shape += ["--prompt-words", "lognormal:64:1:512", "--max-tokens", "lognormal:48:1:256"]
    run.command("trace", trace, "-m", names, "-r", rate, "-d", duration, *shape)
    before = metrics(run)
    run.command("replay", trace, "--url", run.url, "--json", out, "--quiet", "--extra-body", '{"ignore_eos": true}')
    told = json.loads(out.read_text())
    counted = {name: value - before.get(name, 0.0) for name, value in metrics(run).items()}
    return {kind: told["total"][kind] for kind in ("all", "warm", "cold")} | {"metrics": counted}


def metrics(run: Run) -> dict[str, float]:
    """What the engine and the host have counted, over all labels, until now."""
    time.sleep(_BEAT_S)
    text = httpx.get(f"{run.url}/metrics", timeout=10).text
    sums: defaultdict[str, float] = defaultdict(float)
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            ours = sample.name.startswith(("deltazip_engine", "deltazip_host"))
            if ours and sample.name.endswith(("_total", "_count", "_sum")):
                sums[sample.name] += sample.value
    return dict(sums)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--commit", default="")
    parser.add_argument("--device", default="cuda", choices=["cpu", "cuda"])
    parser.add_argument("--shape", default="500m", choices=list(LLAMAS))
    parser.add_argument("--variants", type=int, default=6)
    parser.add_argument("--slots", type=int, default=4)
    parser.add_argument("--samples", type=int, default=16, help="calibration sequences")
    parser.add_argument("--rate", type=float, default=30.0, help="requests a second")
    parser.add_argument("--duration", type=float, default=20.0, help="seconds of the trace; 0: none")
    parser.add_argument("--streams", default="", help="numbers of streaming clients, such as 16,64,256; empty: none")
    parser.add_argument("--kill-until", type=float, default=45.0, help="seconds of load around the kill; 0: no kill")
    parser.add_argument("--port", type=int, default=8123)
    return parser.parse_args()


def main() -> None:
    args = arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the server ends too
    with tempfile.TemporaryDirectory(prefix="serving-") as folder:
        names = tuple(f"v{i}" for i in range(args.variants))
        run = Run(Path(folder), args.json, args.device, args.shape, names, args.port)
        run.report |= {"commit": args.commit, "shape": args.shape, "slots": args.slots, "cores": os.cpu_count()}
        if args.device == "cuda":
            run.report["gpu"] = torch.cuda.get_device_name()
        try:
            with run.stage("models"):
                make_models(run.folder, run.shape, run.device, run.variants)
            (run.folder / "store").mkdir()
            with serving(run, args.slots) as server, ThreadPoolExecutor(1) as pool:
                with run.stage("start, compress, publish and merge"):
                    published = pool.submit(publish, run, args.samples)
                    with run.stage("start"):
                        wait_until_healthy(run, server)
                    published.result()
                with run.stage("first answers"):
                    wait_for_all(run)
                    found = asyncio.run(answers(run, 3))
                with run.stage("judge"):
                    run.report["regret"] = judge(run, found)
                for streams in filter(None, args.streams.split(",")):
                    with run.stage(f"{streams} streams"):
                        there = run.models[: 1 + args.slots]  # all at once
                        told = measure(run.port, run.folder, there, int(streams), STREAMS_S, STREAM_TOKENS)
                        run.report.setdefault("streams", []).append(asyncio.run(told))
                if args.duration:
                    with run.stage("first replay"):  # which meets shapes that are compiled and recorded
                        run.report["first replay"] = replay(run, args.rate, args.duration, SEEDS[0])
                    with run.stage("replay"):
                        run.report["replay"] = replay(run, args.rate, args.duration, SEEDS[1])
                if args.kill_until:
                    with run.stage("kill"):
                        found = asyncio.run(kill_under_load(run, 16, 3.0, args.kill_until))
                    run.report["kill"]["regret"] = judge(run, found)
        finally:
            run.save()
    print(json.dumps(run.report, indent=1))


if __name__ == "__main__":
    main()
