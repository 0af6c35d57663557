"""Which versions replace which, and which are retired. The caller supplies the variants and the time."""

from collections.abc import Iterable
from dataclasses import dataclass

from deltazip_ray.artifact.variants import Variant


@dataclass(frozen=True)
class Change:
    """Changes since the last update."""

    heirs: frozenset[tuple[str, str]]
    """(old, new): an alias moved from one version to the other."""
    retired: frozenset[str]
    """Versions that have had no alias for some time."""


class Succession:
    """Follows the aliases of all variants. A version that never had an alias is never retired."""

    def __init__(self, grace_s: float) -> None:
        """``grace_s``: time from the loss of the last alias to the retirement, as routers notice it later."""
        self._grace_s = grace_s
        self._aliases: dict[tuple[str, str], str] = {}
        self._lost: dict[str, float] = {}

    def update(self, variants: Iterable[Variant], now: float) -> Change:
        """Update the aliases; ``now`` is in seconds of a clock that never goes back."""
        before = self._aliases
        self._aliases = {(one.name, alias): version for one in variants for alias, version in one.aliases.items()}
        named = frozenset(self._aliases.values())
        for version in before.values():
            if version not in named:
                self._lost.setdefault(version, now)
        self._lost = {version: since for version, since in self._lost.items() if version not in named}
        retired = frozenset(version for version, since in self._lost.items() if now - since >= self._grace_s)
        for version in retired:
            del self._lost[version]
        moved = ((old, self._aliases.get(alias, old)) for alias, old in before.items())
        return Change(frozenset((old, new) for old, new in moved if old != new), retired)
