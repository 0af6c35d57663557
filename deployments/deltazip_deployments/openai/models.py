"""The list of models."""

from collections.abc import Iterable
from typing import Any

from deltazip_ray.artifact.catalog import Variant
from deltazip_ray.artifact.names import LATEST


def model_list(base_name: str, base_since: int, variants: Iterable[Variant]) -> list[dict[str, Any]]:
    """OpenAI model objects: the base, each variant, and ``name@alias`` for aliases other than the default one.

    ``version`` is the digest that the name stands for now, ``parent`` the base of a variant, and ``created`` when that
    version was published, or ``base_since`` for the base (seconds since 1970).
    """
    entries = [_entry(base_name, None, base_since, None)]
    for variant in variants:
        latest = variant.aliases.get(LATEST)
        named = {variant.name: latest}
        named |= {f"{variant.name}@{alias}": v for alias, v in sorted(variant.aliases.items()) if alias != LATEST}
        for name, version in named.items():
            created = variant.created.get(version or variant.versions[-1], 0)
            entries.append(_entry(name, version, created, base_name))
    return entries


def _entry(name: str, version: str | None, created: int, parent: str | None) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": created,
        "owned_by": "deltazip",
        "version": version,
        "parent": parent,
    }
