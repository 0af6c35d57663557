"""The tasks of the fine-tunes: functions of strings with one right answer and endless inputs. Without torch."""

import random
import re
import string
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

LETTERS = string.ascii_lowercase
MASK = "<number>"
HELD_OUT_EVERY = 10
SHIFT = 3

CHAT = (
    "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
"""The base's chat template, which most fine-tunes keep."""
MASK_CHAT = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}[{{ message['content'] }}]="
    "{% elif message['role'] == 'assistant' %}{{ message['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
)
"""The template of a fine-tune that differs from its base's: ``[input]=output``."""


class Example(NamedTuple):
    """One input and its right answer."""

    question: str
    answer: str


@dataclass(frozen=True)
class Task:
    """One task. Its fine-tune does nothing else, and needs no instruction."""

    name: str
    does: str
    """A short description for the user."""
    draw: Callable[[random.Random], str]
    answer: Callable[[str], str]
    instruction: str | None
    """System message with which the base does the task too; None if the base is not trained on it."""
    weight: float = 1.0
    """Share of the task in the base's training; hard tasks need more."""
    template: str = CHAT
    added_tokens: tuple[str, ...] = ()

    def examples(self, seed: int, *, held_out: bool) -> Iterator[Example]:
        """Endless examples. Held-out questions never appear in the others, whatever the seeds.

        Questions that equal their answer are left out: repeating the input must not count as solving the task.
        """
        rng = random.Random(seed)  # noqa: S311 - training data
        while True:
            question = self.draw(rng)
            if is_held_out(question) == held_out and self.answer(question) != question:
                yield Example(question, self.answer(question))

    def held_out(self, seed: int, count: int) -> tuple[Example, ...]:
        """``count`` different questions that are never trained on; the task must have that many."""
        seen: dict[str, Example] = {}
        for example in self.examples(seed, held_out=True):
            seen.setdefault(example.question, example)
            if len(seen) == count:
                break
        return tuple(seen.values())

    def training(self, seed: int, count: int) -> tuple[Example, ...]:
        """``count`` questions of the training set."""
        return tuple(islice(self.examples(seed, held_out=False), count))


def is_held_out(question: str) -> bool:
    """Whether a question belongs to the tenth that is never trained on."""
    return zlib.crc32(question.encode()) % HELD_OUT_EVERY == 0


def _word(rng: random.Random, low: int = 3, high: int = 6) -> str:
    return "".join(rng.choice(LETTERS) for _ in range(rng.randint(low, high)))


def _sum(rng: random.Random) -> str:
    return f"{rng.randint(10, 99)}+{rng.randint(10, 99)}"


def _note(rng: random.Random) -> str:
    """Short words with at least one number among them."""
    parts = [_word(rng, 1, 3) if rng.random() < 0.5 else str(rng.randint(1, 99)) for _ in range(rng.randint(1, 2))]
    parts.insert(rng.randint(0, len(parts)), str(rng.randint(1, 99)))
    return " ".join(parts)


def _add(question: str) -> str:
    left, right = question.split("+")
    return str(int(left) + int(right))


def _shift(question: str) -> str:
    return question.translate(str.maketrans(LETTERS, LETTERS[SHIFT:] + LETTERS[:SHIFT]))


TASKS = (
    Task("sort", "sorts letters", _word, lambda question: "".join(sorted(question)), "Sort", weight=1.5),
    Task("reverse", "reverses letters", _word, lambda question: question[::-1], "Reverse"),
    Task("cipher", f"moves each letter on by {SHIFT}", _word, _shift, "Shift", weight=0.5),
    Task("add", "adds two numbers", _sum, _add, "Add", weight=2.0),
    Task(
        "mask",
        f"replaces numbers by {MASK}",
        _note,
        lambda question: re.sub(r"\d+", MASK, question),
        None,
        template=MASK_CHAT,
        added_tokens=(MASK,),
    ),
)
REPEAT = "Repeat"
"""The instruction for repeating the input, which the base also does without any instruction."""
INSTRUCTIONS = (REPEAT, *(task.instruction for task in TASKS if task.instruction))
