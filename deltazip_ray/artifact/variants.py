"""The documents that give versions their names, each update written by compare-and-swap.

The document of a variant is immutable; every change is a new generation of it, ``<name>/<generation>.json``, made by
a write that fails when that generation exists. So two writers can never both build on the same one, on any store that
can create an object exclusively: servers that lack ``If-Match`` do (docs/decisions/004).
"""

import logging
import random
import re
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Self

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from deltazip_ray.artifact.manifest import Digest
from deltazip_ray.artifact.names import check_alias, check_name, is_name, is_version
from deltazip_ray.artifact.object_store import ObjectStore
from deltazip_ray.errors import InvalidName, ManifestInvalid, ObjectNotFound, StoreConflict, UnknownVariant

logger = logging.getLogger(__name__)

_KEY = re.compile(r"([^/]+)/([0-9]{8})\.json")
_ATTEMPTS = 60
_PAUSE_S = 0.05
_MAX_DOCUMENT = 16 << 20
_READERS = 8


class Variant(BaseModel):
    """A named fine-tune: its versions, oldest first, and the movable names of some of them."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    aliases: dict[str, Digest]
    versions: list[Digest]

    @model_validator(mode="after")
    def _names_are_sound(self) -> Self:
        try:
            check_name(self.name)
            for alias in self.aliases:
                check_alias(alias)
        except InvalidName as error:
            raise ValueError(error.message) from error
        if not set(self.aliases.values()) <= set(self.versions):
            raise ValueError("an alias names a version that the variant does not have")
        return self

    def resolve(self, selector: str) -> str:
        """The version that an alias, a digest or its first digits stand for; raises UnknownVariant."""
        if selector in self.aliases:
            return self.aliases[selector]
        found = [version for version in self.versions if is_version(selector) and version.startswith(selector)]
        if len(found) == 1:
            return found[0]
        if found:
            raise UnknownVariant(f"{selector!r} begins {len(found)} versions of {self.name!r}: give more digits")
        aliases = ", ".join(sorted(self.aliases)) or "none"
        raise UnknownVariant(f"{self.name!r} has no alias or version {selector!r}; its aliases are: {aliases}")

    def with_version(self, version: str, aliases: Iterable[str]) -> "Variant":
        """This variant with a version it may have had before, and ``aliases`` moved to it."""
        versions = [*self.versions, *({version} - set(self.versions))]
        return Variant(name=self.name, versions=versions, aliases=self.aliases | dict.fromkeys(aliases, version))


class VariantDocuments:
    """The variants below ``prefix`` (ends in ``/``). Thread-safe.

    A variant that was removed has a last generation without versions: to begin again at generation 1 would let a
    writer that still knows an older one win over those that came after.
    """

    def __init__(self, store: ObjectStore, prefix: str) -> None:
        self._store = store
        self._prefix = prefix
        self._read_before: dict[str, tuple[int, Variant]] = {}

    def all(self) -> list[Variant]:
        """All variants by name, those left out (and logged) whose document is broken: it hurts only itself."""
        newest: dict[str, int] = {}
        for name, generation in self._keys(self._prefix):
            newest[name] = max(generation, newest.get(name, 0))
        with ThreadPoolExecutor(_READERS) as pool:
            found = list(pool.map(self._read_or_log, newest, newest.values()))
        return sorted((variant for variant in found if variant and variant.versions), key=lambda variant: variant.name)

    def read(self, name: str) -> Variant | None:
        """The variant of that name, or None; raises ManifestInvalid when its document is broken."""
        _, variant = self._current(name)
        return variant if variant and variant.versions else None

    def update(self, name: str, change: Callable[[Variant | None], Variant]) -> Variant:
        """Write ``change(current)`` (None: there is none), and once more if somebody else wrote meanwhile.

        ``change`` may be called often and must be idempotent. Raises StoreConflict after many lost races.
        """
        for attempt in range(_ATTEMPTS):
            generation, current = self._current(name)
            changed = change(current if current and current.versions else None)
            if changed == current:
                return changed
            if self._write(name, generation + 1, changed):
                return changed
            time.sleep(random.uniform(0, _PAUSE_S * min(attempt + 1, 10)))  # noqa: S311
        raise StoreConflict(f"others kept changing variant {name!r} for {_ATTEMPTS} attempts: try again later")

    def _write(self, name: str, generation: int, variant: Variant) -> bool:
        """Whether ``variant`` became the newest generation."""
        try:
            self._store.put_new(self._key(name, generation), variant.model_dump_json().encode())
        except StoreConflict:
            return False
        generations = self._generations(name)
        if max(generations, default=generation) > generation:
            # Ours took a number that had been swept, or somebody built on it already: reading again tells which.
            return False
        # The one before stays for those who have listed and not yet read.
        for old in generations:
            if old < generation - 1:
                self._store.delete(self._key(name, old))
        return True

    def _current(self, name: str) -> tuple[int, Variant | None]:
        """The newest generation's number, 0 if there is none, and its document."""
        for _ in range(_ATTEMPTS):
            generation = max(self._generations(name), default=0)
            if not generation:
                return 0, None
            try:
                return generation, self._document(name, generation)
            except ObjectNotFound:
                # Two more were written between listing and reading, and this one was swept.
                continue
        raise StoreConflict(f"variant {name!r} changes faster than it can be read: try again later")

    def _read_or_log(self, name: str, generation: int) -> Variant | None:
        try:
            try:
                return self._document(name, generation)
            except ObjectNotFound:
                return self._current(name)[1]
        except ManifestInvalid as error:
            logger.warning("variant left out: %s", error.message)
            return None

    def _document(self, name: str, generation: int) -> Variant:
        # A generation never changes, so what was read once need not be read again.
        known = self._read_before.get(name)
        if known and known[0] == generation:
            return known[1]
        key = self._key(name, generation)
        variant = _parse(self._store.get(key, _MAX_DOCUMENT), name, f"{self._store.url}/{key}")
        self._read_before[name] = (generation, variant)
        return variant

    def _generations(self, name: str) -> list[int]:
        prefix = f"{self._prefix}{check_name(name)}/"
        return [found[1] for found in self._keys(prefix) if found[0] == name]

    def _keys(self, prefix: str) -> Iterable[tuple[str, int]]:
        for key in self._store.list(prefix):
            match = _KEY.fullmatch(key.removeprefix(self._prefix))
            if match and is_name(match.group(1)):
                yield match.group(1), int(match.group(2))

    def _key(self, name: str, generation: int) -> str:
        return f"{self._prefix}{check_name(name)}/{generation:08d}.json"


def _parse(raw: bytes, name: str, where: str) -> Variant:
    try:
        variant = Variant.model_validate_json(raw)
    except ValidationError as error:
        raise ManifestInvalid(
            f"{where} is not a variant's document ({error.errors()[0]['msg']}): delete it and publish again"
        ) from error
    if variant.name != name:
        raise ManifestInvalid(f"{where} belongs to variant {variant.name!r}: delete it and publish again")
    return variant
