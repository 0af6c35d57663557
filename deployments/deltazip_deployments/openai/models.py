"""The list of models that clients may put into ``model``."""

from collections.abc import Iterable
from typing import Any

from deltazip_ray.artifact.catalog import Variant
from deltazip_ray.artifact.names import LATEST


def model_list(base_name: str, variants: Iterable[Variant]) -> list[dict[str, Any]]:
    """OpenAI model objects: the base, each variant, and ``name@alias`` for aliases other than the default one.

    ``version`` is the digest that the name stands for now, ``parent`` the base that a variant belongs to.
    """
    entries = [_entry(base_name, None, None)]
    for variant in variants:
        entries.append(_entry(variant.name, variant.aliases.get(LATEST), base_name))
        others = sorted(variant.aliases.items())
        entries += [
            _entry(f"{variant.name}@{alias}", version, base_name) for alias, version in others if alias != LATEST
        ]
    return entries


def _entry(name: str, version: str | None, parent: str | None) -> dict[str, Any]:
    # The catalog keeps no creation times; the API wants a number.
    return {"id": name, "object": "model", "created": 0, "owned_by": "deltazip", "version": version, "parent": parent}
