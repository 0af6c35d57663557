"""Products of low rank with a sparse residue against dense codes, at equal bytes, on the demo's fine-tunes.

    python -m benchmarks.quality.low_rank ~/.cache/deltazip/demo --commit COMMIT > quality_low_rank.jsonl

Takes the models that ``make demo`` has trained. Each line is one form of one fine-tune: bytes, and KL against the
fine-tune on fresh chats.
"""

import argparse
import json
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from benchmarks.quality.allocation import CALIBRATION, FRESH, SEED, chat, chats
from benchmarks.quality.artifacts import Workshop
from deltazip_deployments.demo.tasks import TASKS
from deltazip_ray.compress.options import Coding
from deltazip_ray.compress.pairing import open_pair

CODECS: tuple[Coding, ...] = ("int1", "int2")
SHARES = (1.0, 0.75, 0.5, 0.0)
"""Of the bytes that go to the product."""


@torch.no_grad()
def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("models", type=Path, help="folder with base and fine-tunes")
    arguments.add_argument("--commit", required=True)
    given = arguments.parse_args()
    torch.set_num_threads(1)
    for task in TASKS:
        finetuned = given.models / task.name
        if open_pair(given.models / "base", finetuned).added:
            continue  # added rows cost all forms the same
        tokens, mask = chats(finetuned, task.held_out(SEED, FRESH))
        model = AutoModelForCausalLM.from_pretrained(finetuned, dtype=torch.float32)
        wanted = model(tokens).logits[mask].log_softmax(-1)
        with tempfile.TemporaryDirectory() as scratch:
            data = Path(scratch, "chats.jsonl")
            data.write_text("".join(chat(example) + "\n" for example in task.training(SEED, CALIBRATION)))
            shop = Workshop(given.models / "base", finetuned, data, CALIBRATION, "cpu", Path(scratch))
            forms: dict[str, tuple[Coding, float | None]] = {f"{codec} for all": (codec, None) for codec in CODECS}
            forms |= {f"bytes of {codec}, {share:.0%} product": (codec, share) for codec in CODECS for share in SHARES}
            for name, (codec, share) in forms.items():
                made = shop.compressed(codec=codec) if share is None else shop.factored(codec, share)
                model.load_state_dict(dict(made.weights), strict=False)
                found = model(tokens).logits[mask].log_softmax(-1)
                kl = float((wanted.exp() * (wanted - found)).sum(-1).mean())
                row = {"commit": given.commit, "task": task.name, "form": name, "bytes": made.bytes_gpu, "kl": kl}
                print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
