"""Calibration sequences: read from files, rendered from chats, or sampled from the fine-tune."""

import json
import sys
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from deltazip_ray.compress.calibration import Calibration, load_calibration, load_tokenizer
from deltazip_ray.compress.options import CompressOptions
from deltazip_ray.compress.pairing import Pair, open_pair
from deltazip_ray.errors import CompressionError
from tests.support.tiny import make_base, make_finetune, make_tokenizer

TEMPLATE = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}>{% endif %}"
)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder = tmp_path_factory.mktemp("calibration")
    base = make_base(folder / "base")
    return open_pair(base, make_finetune(base, folder / "finetuned", template=TEMPLATE))


def load(pair: Pair, **options: object) -> Calibration:
    return load_calibration(
        pair.finetuned, pair.skeleton, CompressOptions.model_validate(options), lambda fraction: None
    )


def texts(calibration: Calibration, pair: Pair) -> list[str]:
    tokenizer = load_tokenizer(pair.finetuned)
    rows = zip(calibration.tokens, calibration.mask, strict=True)
    return [tokenizer.decode(tokens[mask]) for tokens, mask in rows]


def test_a_text_is_cut_into_pieces_spread_over_it(pair: Pair, tmp_path: Path) -> None:
    file = tmp_path / "notes.txt"
    file.write_text("a" * 100 + "b" * 100 + "c" * 100)
    found = load(pair, calibration=file, samples=4, sequence_length=20, held_out=0.25)
    assert texts(found, pair) == ["a" * 20, "a" * 7 + "b" * 13, "b" * 14 + "c" * 6, "c" * 20]
    assert (found.fitted, found.held_out) == (3, 1)
    assert found.data == "4 sequences of notes.txt"


def test_a_short_text_is_still_split_in_two(pair: Pair, tmp_path: Path) -> None:
    file = tmp_path / "short.txt"
    file.write_text("abcdef")
    assert texts(load(pair, calibration=file), pair) == ["abc", "def"]


def test_a_text_that_is_too_short(pair: Pair, tmp_path: Path) -> None:
    file = tmp_path / "short.txt"
    for text in ("", "ab"):
        file.write_text(text)
        with pytest.raises(CompressionError, match=r"short\.txt gives \d calibration sequences.*give a longer file"):
            load(pair, calibration=file)


def test_files_that_cannot_be_read(pair: Pair, tmp_path: Path) -> None:
    with pytest.raises(CompressionError, match="cannot read the calibration file"):
        load(pair, calibration=tmp_path / "absent.txt")
    (tmp_path / "bytes.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(CompressionError, match="cannot read the calibration file"):
        load(pair, calibration=tmp_path / "bytes.jsonl")


def write_chats(path: Path, questions: list[str]) -> Path:
    chats = [[{"role": "user", "content": q}, {"role": "assistant", "content": q.upper()}] for q in questions]
    path.write_text("\n".join(json.dumps({"messages": chat}) for chat in chats) + "\n\n")
    return path


def test_chats_are_rendered_with_the_template_of_the_finetune(pair: Pair, tmp_path: Path) -> None:
    file = write_chats(tmp_path / "chats.jsonl", ["ab", "cde", "f", "gh"])
    found = load(pair, calibration=file)
    assert sorted(texts(found, pair)) == [
        f"[user]{question}[assistant]{question.upper()}" for question in ("ab", "cde", "f", "gh")
    ]
    assert not found.mask.all()
    assert torch.equal(load(pair, calibration=file).tokens, found.tokens)
    assert len(load(pair, calibration=file, samples=2).tokens) == 2


@pytest.mark.parametrize("line", ["{", "[]", '{"text": "x"}', '{"messages": 3}', '{"messages": [{"content": 1}, 2]}'])
def test_a_line_that_is_no_chat_is_named(pair: Pair, tmp_path: Path, line: str) -> None:
    file = write_chats(tmp_path / "chats.jsonl", ["ab"])
    file.write_text(file.read_text() + line)
    with pytest.raises(CompressionError, match=r"chats\.jsonl, line 3 cannot be rendered"):
        load(pair, calibration=file)


def test_sampled_sequences_alternate_between_documents_and_chats(pair: Pair) -> None:
    found = load(pair, samples=8, sequence_length=40)
    drawn = texts(found, pair)
    assert all(text.startswith("[user]") for text in drawn[::2])
    assert all("[user]" not in text for text in drawn[1::2])
    assert all(">" in text for text in drawn[::2])
    assert found.data == "8 sequences sampled from the fine-tune, seed 0"


def test_sampling_depends_on_the_seed_alone(pair: Pair) -> None:
    first, again = load(pair, samples=6, sequence_length=24), load(pair, samples=6, sequence_length=24)
    assert torch.equal(first.tokens, again.tokens)
    assert not torch.equal(first.tokens[:, :10], load(pair, samples=6, sequence_length=24, seed=1).tokens[:, :10])


def test_sampled_sequences_end_after_their_last_token(pair: Pair) -> None:
    found = load(pair, samples=64, sequence_length=200)
    end = make_tokenizer().eos_token_id
    ended = 0
    for tokens, mask in zip(found.tokens, found.mask, strict=True):
        length = int(mask.sum())
        assert bool(mask[:length].all())
        assert end not in tokens[: length - 1]
        ended += int(tokens[length - 1] == end)
    assert ended > 16
    assert not found.mask.all()


def test_tokens_beyond_the_embedding(pair: Pair, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    finetuned = make_finetune(base, tmp_path / "finetuned")
    tokenizer = load_tokenizer(pair.finetuned)
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(finetuned)
    file = tmp_path / "text.txt"
    file.write_text("ab<new>cdef" * 20)
    broken = open_pair(base, finetuned)
    with pytest.raises(CompressionError, match="gives token 86, but its embedding has 86 rows"):
        load(broken, calibration=file)


def dataset(folder: Path, rows: list[dict[str, object]]) -> str:
    """A folder that the datasets package takes for a dataset."""
    folder.mkdir()
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


def test_a_dataset_of_texts(pair: Pair, tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [{"id": i, "text": letter * 40} for i, letter in enumerate("abcdefgh")]
    name = dataset(tmp_path / "texts", rows)
    found = load(pair, dataset=name, samples=4, sequence_length=20)
    assert found.data == f"4 sequences of {name}"
    assert all(len(text) == 20 for text in texts(found, pair))
    assert texts(found, pair) == texts(load(pair, dataset=name, samples=4, sequence_length=20), pair)
    assert texts(found, pair) != texts(load(pair, dataset=name, samples=4, sequence_length=20, seed=5), pair)


def test_a_dataset_of_chats(pair: Pair, tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [{"messages": [{"role": "user", "content": letter}]} for letter in "abcdefgh"]
    found = load(pair, dataset=dataset(tmp_path / "chats", rows), samples=3)
    assert len(texts(found, pair)) == 3
    assert set(texts(found, pair)) < {f"[user]{letter}" for letter in "abcdefgh"}


def test_datasets_that_cannot_be_used(pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = dataset(tmp_path / "numbers", [{"number": 1}, {"number": 2}])
    with pytest.raises(CompressionError, match=r"has columns number, but calibration needs messages or text"):
        load(pair, dataset=name)
    with pytest.raises(CompressionError, match=r"cannot read the dataset .*: give a text file|Without a network give"):
        load(pair, dataset=str(tmp_path / "nowhere"))
    with pytest.raises(ValidationError, match="contradict each other"):
        load(pair, dataset=name, calibration=tmp_path / "text")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(CompressionError, match=r"pip install 'deltazip-ray\[data\]'"):
        load(pair, dataset=name)
