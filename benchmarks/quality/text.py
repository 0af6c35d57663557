"""Real text that the machine has: source code and documentation of installed packages, and a tokenizer for it."""

import hashlib
import os
import site
import sysconfig
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from deltazip_deployments.demo.tasks import CHAT

SUFFIXES = (".py", ".pyi", ".md", ".rst", ".txt", ".html")
DOCS = Path("/usr/share/doc")
SMALLEST, LARGEST = 500, 200_000
"""Bytes of a file: stubs teach nothing, and tables of data would take over."""
LONGEST_LINE = 400
HELD_OUT_EVERY = 50
READERS = 16
BOS, EOS, PAD = "<bos>", "<eos>", "<pad>"
SPECIAL = (PAD, BOS, EOS, "<|system|>", "<|user|>", "<|assistant|>")
CHUNK = 2000


class Corpus(NamedTuple):
    """Documents, each the text of one file."""

    training: list[str]
    held_out: list[str]


def read_corpus(limit: int) -> Corpus:
    """About ``limit`` bytes of different documents, in an order that follows from their paths."""
    documents: list[str] = []
    seen: set[bytes] = set()
    size = 0
    with ThreadPoolExecutor(READERS) as pool:
        for data in pool.map(_read, _files(limit)):
            digest = hashlib.sha256(data).digest()
            if not data or digest in seen:
                continue
            seen.add(digest)
            documents.append(data.decode())
            size += len(data)
            if size >= limit:
                break
    held_out = documents[::HELD_OUT_EVERY]
    del documents[::HELD_OUT_EVERY]
    return Corpus(documents, held_out)


def train_tokenizer(documents: Sequence[str], vocab: int, limit: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE with single digits, trained on the first ``limit`` characters."""
    tokenizer = Tokenizer(models.BPE())
    digits, split = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, split])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_first(documents, limit), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        additional_special_tokens=list(SPECIAL[3:]),
        chat_template=CHAT,
        clean_up_tokenization_spaces=False,
    )


def to_stream(tokenizer: PreTrainedTokenizerFast, documents: Sequence[str]) -> np.ndarray:
    """All documents in one row of tokens, u16, each between a first and a last token of its own."""
    fast = tokenizer.backend_tokenizer
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    pieces = []
    for start in range(0, len(documents), CHUNK):
        encoded = fast.encode_batch_fast(documents[start : start + CHUNK], add_special_tokens=False)
        pieces += [np.array([bos, *document.ids, eos], np.uint16) for document in encoded]
    return np.concatenate(pieces)


def _files(limit: int) -> list[Path]:
    """Files that may be used, shuffled by their names; somewhat more than ``limit`` bytes."""
    paths = sysconfig.get_paths()
    packages: list[str] = site.getsitepackages()
    roots = {DOCS, *map(Path, (paths["stdlib"], paths["purelib"], *packages))}
    found = {
        Path(folder, name)
        for root in roots
        for folder, _, names in os.walk(root)
        for name in names
        if name.endswith(SUFFIXES)
    }
    order = sorted(found, key=lambda path: hashlib.sha256(str(path).encode()).digest())
    chosen, size = [], 0
    for path in order:
        here = path.stat().st_size if path.is_file() else 0
        if SMALLEST <= here <= LARGEST:
            chosen.append(path)
            size += here
        if size > 1.5 * limit:
            break
    return chosen


def _read(path: Path) -> bytes:
    """The file, or nothing when it is no text."""
    data = path.read_bytes()
    try:
        text = data.decode()
    except UnicodeDecodeError:
        return b""
    return data if max(map(len, text.splitlines()), default=0) <= LONGEST_LINE else b""


def _first(documents: Sequence[str], limit: int) -> Iterator[str]:
    for document in documents:
        yield document
        limit -= len(document)
        if limit < 0:
            return
