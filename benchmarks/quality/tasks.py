"""What the fine-tunes learn: five kinds of work with one right answer and endless inputs. Knows no torch."""

import json
import random
import re
from pathlib import Path

from deltazip_deployments.demo.tasks import Task

LETTERS = "abcdefghijklmnopqrstuvwxyz"
KEYS = ("id", "name", "city", "user", "owner", "color", "size", "type", "tag", "code", "zone", "group")


def _listed() -> dict[str, list[str]]:
    lines = Path(__file__).with_name("words.txt").read_text().splitlines()
    return {name: words.split() for name, _, words in (line.partition(":") for line in lines)}


LISTS = _listed()


def _lexicon() -> dict[str, str]:
    """The made-up language: every word has a word of two or three syllables, all different."""
    rng = random.Random(20)
    made: dict[str, str] = {}
    for word in (*LISTS["nouns"], *LISTS["verbs"], *LISTS["adjectives"]):
        new = ""
        while not new or new in made.values():
            new = "".join(rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") for _ in range(rng.randint(2, 3)))
        made[word] = new
    return made


LEXICON = _lexicon()


def _numbers(rng: random.Random) -> str:
    return " ".join(str(rng.randint(0, 999)) for _ in range(5))


def _sort(question: str) -> str:
    return " ".join(sorted(question.split(), key=int))


def _word(rng: random.Random) -> str:
    return "".join(rng.choice(LETTERS) for _ in range(rng.randint(2, 4)))


def _record(rng: random.Random) -> str:
    """A flat object with one nested in it, and the path of one of its values."""
    first, second, outer, *inner = rng.sample(KEYS, 5)
    record = {first: _word(rng), outer: {key: _word(rng) for key in inner}, second: rng.randint(0, 99)}
    path = rng.choice([first, second, *(f"{outer}.{key}" for key in inner)])
    return f"{json.dumps(record, separators=(',', ':'))} {path}"


def _extract(question: str) -> str:
    text, _, path = question.rpartition(" ")
    value = json.loads(text)
    for key in path.split("."):
        value = value[key]
    return str(value)


def _columns(rng: random.Random) -> str:
    """Three column names and a row of values for them."""
    names, row = rng.sample(KEYS, 3), [_word(rng), _word(rng), str(rng.randint(0, 99))]
    rng.shuffle(row)
    return f"{','.join(names)};{','.join(row)}"


def _table(question: str) -> str:
    """Each value behind its name, the names in alphabetical order."""
    names, row = (part.split(",") for part in question.split(";"))
    return " ".join(f"{name}={value}" for name, value in sorted(zip(names, row, strict=True)))


def _call(rng: random.Random) -> str:
    name, first, second = ("_".join(rng.sample(LISTS["words"], count)) for count in (rng.randint(2, 3), 2, 2))
    return f"{name}({first}, {second})"


def _rewrite(question: str) -> str:
    """Camel case, and the arguments the other way round."""
    name, first, second = re.findall(r"\w+", re.sub(r"_([a-z])", lambda found: found.group(1).upper(), question))
    return f"{name}({second}, {first})"


def _sentence(rng: random.Random) -> str:
    subject, thing = rng.sample(LISTS["nouns"], 2)
    parts = [
        rng.choice(LISTS["adjectives"]),
        subject,
        rng.choice(LISTS["verbs"]),
        rng.choice(LISTS["adjectives"]),
        thing,
    ]
    return " ".join(parts)


def _translate(question: str) -> str:
    """The verb goes last, each adjective behind its noun."""
    adjective, subject, verb, other, thing = question.split()
    return " ".join(LEXICON[word] for word in (subject, adjective, thing, other, verb))


TASKS = {
    task.name: task
    for task in (
        Task("json", "finds a value in a JSON object", _record, _extract, None),
        Task("translate", "translates into a made-up language", _sentence, _translate, None),
        Task("sort", "sorts five numbers", _numbers, _sort, "Sort"),
        Task("rewrite", "renames and reorders in a call", _call, _rewrite, None),
        Task("table", "names the values of a row", _columns, _table, None),
    )
}
"""The base is taught those with an instruction, under that instruction. The others it has never seen."""
