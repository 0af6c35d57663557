"""Token sequences from texts and chats in files and datasets."""

import json
import random
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from pydantic import BaseModel, Field, ValidationError

from deltazip_ray.compress.hub_data import dataset_rows
from deltazip_ray.compress.options import CompressOptions
from deltazip_ray.errors import CompressionError

CHARACTERS = 8
"""Characters of text to read for each token needed: more than most tokenizers put into one."""


class _Chat(BaseModel):
    """One line of a file, or row of a dataset; other keys are ignored."""

    messages: list[dict[str, Any]] = Field(min_length=1)


def from_file(path: Path, tokenizer: Any, length: int, options: CompressOptions) -> Iterator[list[int]]:
    """Pieces of a text, or the chats of a ``.jsonl`` file in an order that depends on the seed."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CompressionError(f"cannot read the calibration file {path}: {error}") from error
    if path.suffix != ".jsonl":
        return _pieces(text, tokenizer, length, options)
    lines = [(f"{path}, line {number}", line) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    random.Random(options.seed).shuffle(lines)  # noqa: S311 - a choice of samples, no secret
    return _rendered(str(path), lines[: options.samples], tokenizer, length)


def from_dataset(name: str, tokenizer: Any, length: int, options: CompressOptions) -> Iterator[list[int]]:
    """The same for a Hugging Face dataset whose rows have ``messages`` or ``text``."""
    rows = dataset_rows(name, options.seed)
    first = next(rows, {})
    rows = chain([first], rows)
    if "messages" in first:
        chats = ((f"{name}, row {number}", json.dumps(row)) for number, row in enumerate(rows, 1))
        return _rendered(name, islice(chats, options.samples), tokenizer, length)
    if not isinstance(first.get("text"), str):
        raise CompressionError(
            f"the dataset {name} has columns {', '.join(first) or '(none)'}, but calibration needs messages or text: "
            "write the data to a text file, or to a .jsonl file of chats"
        )
    texts, missing = [], CHARACTERS * length * options.samples
    for row in rows:
        texts.append(row["text"])
        missing -= len(texts[-1])
        if missing <= 0:
            break
    return _pieces("\n".join(texts), tokenizer, length, options)


def _pieces(text: str, tokenizer: Any, length: int, options: CompressOptions) -> Iterator[list[int]]:
    """Evenly spaced pieces of a text; each starts with the tokens that the tokenizer puts before a text."""
    start = tokenizer("")["input_ids"][:1]
    start = start if start == [tokenizer.bos_token_id] else []
    tokens = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    piece = min(length - len(start), len(tokens) // 2)
    count = min(options.samples, len(tokens) // piece) if piece else 0
    for i in range(count):
        at = i * (len(tokens) - piece) // max(1, count - 1)
        yield start + tokens[at : at + piece]


def _rendered(source: str, chats: Iterable[tuple[str, str]], tokenizer: Any, length: int) -> Iterator[list[int]]:
    """Chats, given as (location, JSON), rendered with the tokenizer's template and cut to ``length`` tokens."""
    if tokenizer.chat_template is None:
        raise CompressionError(
            f"{source} contains chats, but the fine-tune has no chat template: give a text file instead"
        )
    for where, line in chats:
        try:
            text = tokenizer.apply_chat_template(_Chat.model_validate_json(line).messages, tokenize=False)
        except (ValueError, TypeError, TemplateError) as error:
            reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else repr(error)
            raise CompressionError(
                f"{where} cannot be rendered with the fine-tune's chat template ({reason}): "
                'write {"messages": [{"role": "user", "content": "…"}, …]}'
            ) from error
        yield tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"][:length]
