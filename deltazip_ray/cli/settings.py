"""``deltazip settings``: what may stand in the ``args`` of a Serve config."""

from collections.abc import Iterator
from types import UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

import typer
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from deltazip_ray.cli.console import out, table
from deltazip_ray.config import AppConfig

_REQUIRED = "required"


class Setting(NamedTuple):
    """One line of the reference."""

    name: str
    """As in YAML, with dots: ``engine.slots``."""
    default: str
    """Empty where the setting may be absent."""
    meaning: str


def settings(
    markdown: Annotated[bool, typer.Option("--markdown", help="As docs/settings.md has it.")] = False,
) -> None:
    """List what the config of `deltazip serve` may hold, with defaults.

    Example: deltazip settings | grep slot
    """
    found = list(all_settings(AppConfig))
    if markdown:
        typer.echo(as_markdown(found), nl=False)
    elif out.is_terminal:
        table("", ("setting", "default", "meaning"), found)
    else:
        for setting in found:
            typer.echo("\t".join(setting))


def all_settings(model: type[BaseModel], prefix: str = "") -> Iterator[Setting]:
    """The settings of ``model`` and of those inside it, in the order of their definition."""
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from all_settings(kind, f"{prefix}{name}.")
        else:
            yield Setting(prefix + name, _default(field), _meaning(field))


_EXAMPLE = """\
```yaml
base: /models/llama
store: {url: "s3://models/deltas"}
engine: {device: cuda, dtype: bfloat16, max_model_len: 8192, slots: 16, warm_codecs: [int2]}
node_store: {arena_bytes: 34359738368, disk_dir: /cache/deltas}
```"""


def as_markdown(found: list[Setting]) -> str:
    """A page, with a table for each part of the config."""
    lines = [
        "# Settings",
        "",
        "What the `args` of a Serve config may hold, or the file of `deltazip serve` itself; anything else is refused.",
        "Made by `deltazip settings --markdown > docs/settings.md`.",
        "",
        _EXAMPLE,
    ]
    parts: dict[str, list[Setting]] = {}
    for one in found:
        parts.setdefault(one.name.partition(".")[0] if "." in one.name else "application", []).append(one)
    for part, members in parts.items():
        lines += ["", f"## {part}", "| setting | default | |", "|---|---|---|"]
        lines += [f"| `{one.name}` | {_quoted(one.default)} | {one.meaning} |" for one in members]
    return "\n".join(lines) + "\n"


def _quoted(default: str) -> str:
    return f"`{default}`" if default not in ("", _REQUIRED) else default


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return _REQUIRED
    value = field.default
    if value is None or value in ((), {}):
        return ""
    return str(value).lower() if isinstance(value, bool) else str(value)


def _meaning(field: FieldInfo) -> str:
    choices = _choices(field.annotation)
    named = f"one of {', '.join(choices)}" if len(choices) > 1 else ""
    return "; ".join(part for part in (field.description, named) if part)


def _choices(kind: Any) -> list[str]:
    """What a setting that takes a few words takes."""
    if get_origin(kind) is Literal:
        return [str(choice) for choice in get_args(kind)]
    if get_origin(kind) in (Union, UnionType, tuple):
        return [choice for one in get_args(kind) for choice in _choices(one)]
    return []
