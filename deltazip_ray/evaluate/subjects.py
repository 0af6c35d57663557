"""The things that can be scored, each as a model of lm-eval."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from deltazip_ray.artifact.checkpoint import Checkpoint
from deltazip_ray.compress.merge import merge
from deltazip_ray.compress.options import Progress
from deltazip_ray.config import StoreConfig

CONCURRENT = 32
"""Concurrent requests to an endpoint."""


@dataclass(frozen=True)
class Model:
    """The arguments of ``lm_eval.simple_evaluate`` that describe a model."""

    kind: Literal["hf", "local-completions", "local-chat-completions"]
    arguments: dict[str, Any]
    device: str | None = None


def of_checkpoint(path: Path, device: str) -> Model:
    """A Hugging Face checkpoint's folder. Raises CheckpointInvalid."""
    Checkpoint.open(path)  # has better error messages than lm-eval, and refuses checkpoints with code
    return Model("hf", {"pretrained": str(path), "dtype": "auto"}, device)


@contextmanager
def of_artifact(base: Path, artifact: StoreConfig, device: str, progress: Progress) -> Iterator[Model]:
    """An artifact merged with ``base`` in a temporary folder: the weights that the server computes with.

    Raises what ``merge`` raises.
    """
    with tempfile.TemporaryDirectory(prefix="deltazip-eval-") as folder:
        merge(base, artifact, Path(folder) / "merged", progress=progress)
        yield of_checkpoint(Path(folder) / "merged", device)


def of_endpoint(url: str, name: str, *, chat: bool, tokenizer: Path | None) -> Model:
    """The model ``name`` of an OpenAI-compatible server whose ``url`` ends in ``/v1``.

    Tasks that score given answers, not generated ones, need a ``tokenizer`` and a server that echoes logprobs.
    """
    arguments: dict[str, Any] = {
        "model": name,
        "base_url": f"{url.rstrip('/')}/{'chat/completions' if chat else 'completions'}",
        "num_concurrent": CONCURRENT,
        "tokenizer_backend": None if tokenizer is None else "huggingface",
        "tokenizer": None if tokenizer is None else str(tokenizer),
    }
    return Model("local-chat-completions" if chat else "local-completions", arguments)
