"""The documents that give versions their names. No concurrent write is lost, on any object store.

A variant is the fold of its events: a version was published, an alias moved, the variant was removed. Events are only
ever added. Every write creates a new object ``<name>/<id>.json`` with all known events and the new one, and readers
take the union of all objects. So no write can overwrite another, and none needs a conditional request, which some
S3-compatible servers lack or only pretend to support (docs/decisions/004).
"""

import logging
import re
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from deltazip_ray.artifact.manifest import Digest
from deltazip_ray.artifact.names import check_alias, check_name, is_name, is_version
from deltazip_ray.artifact.object_store import ObjectStore
from deltazip_ray.errors import InvalidName, ManifestInvalid, ObjectNotFound, StoreConflict, UnknownVariant

logger = logging.getLogger(__name__)

_KEY = re.compile(r"([^/]+)/[0-9a-f]{32}\.json")
_ATTEMPTS = 20
_MAX_DOCUMENT = 16 << 20
_READERS = 8


class Variant(BaseModel):
    """A named fine-tune: its versions, oldest first, and the movable names of some of them."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    aliases: dict[str, Digest]
    versions: list[Digest]
    created: dict[Digest, int] = Field(default_factory=dict)
    """When each version was first published: seconds since 1970 on the publisher's clock, 0 if unknown."""

    def resolve(self, selector: str) -> str:
        """The version that an alias, a digest or its first digits name; raises UnknownVariant."""
        if selector in self.aliases:
            return self.aliases[selector]
        found = [version for version in self.versions if is_version(selector) and version.startswith(selector)]
        if len(found) == 1:
            return found[0]
        if found:
            raise UnknownVariant(f"{len(found)} versions of {self.name!r} begin with {selector!r}: give more digits")
        aliases = ", ".join(sorted(self.aliases)) or "none"
        raise UnknownVariant(f"{self.name!r} has no alias or version {selector!r}; its aliases are: {aliases}")


def _alias(alias: str) -> str:
    try:
        return check_alias(alias)
    except InvalidName as error:
        raise ValueError(error.message) from error


class _Event(BaseModel):
    """``version`` was published, perhaps again, and ``aliases`` moved to it; None: the variant was removed."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    turn: int = Field(ge=1, lt=1 << 53)
    """One more than the highest turn that the writer had seen (a Lamport clock)."""
    id: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{32}$")]
    at: int = Field(0, ge=0)
    """Seconds since 1970; shown to people, never compared."""
    version: Digest | None = None
    aliases: tuple[Annotated[str, AfterValidator(_alias)], ...] = ()


class _Document(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    events: frozenset[_Event]


Documents = Mapping[str, frozenset[_Event]]
"""The events of each document of one variant, by key."""


class VariantDocuments:
    """The variants below ``prefix`` (ends in ``/``). Thread-safe."""

    def __init__(self, store: ObjectStore, prefix: str) -> None:
        self._store = store
        self._prefix = prefix
        self._read_before: dict[str, frozenset[_Event]] = {}
        """Contents by key of the documents that existed at the last listing."""
        self._found: dict[str, tuple[Sequence[str], Variant]] = {}
        """Variants of the last listing, by name, with the keys of their documents, which never change."""

    def all(self) -> list[Variant]:
        """All variants, sorted by name. One with a broken document is logged and left out."""
        keys: dict[str, list[str]] = {}
        for key in self._store.list(self._prefix):
            match = _KEY.fullmatch(key.removeprefix(self._prefix))
            if match and is_name(match.group(1)):
                keys.setdefault(match.group(1), []).append(key)
        for gone in self._read_before.keys() - {key for each in keys.values() for key in each}:
            self._read_before.pop(gone, None)
        found = {name: known for name, known in self._found.items() if keys.get(name) == known[0]}
        new = [name for name in keys if name not in found]
        with ThreadPoolExecutor(_READERS) as pool:
            read = pool.map(self._read_or_log, new, [keys[name] for name in new])
            found |= {name: (keys[name], variant) for name, variant in zip(new, read, strict=True) if variant}
        self._found = found
        return [found[name][1] for name in sorted(found)]

    def read(self, name: str) -> Variant | None:
        """The variant of that name, or None; raises InvalidName, ManifestInvalid when a document is broken."""
        return _fold(name, _union(self._documents(name)))

    def publish(self, name: str, version: str, aliases: Iterable[str]) -> Variant:
        """Add a version, which may exist already, to variant ``name``, move ``aliases`` to it, return the variant."""
        return self._add(name, version, tuple(aliases))

    def remove(self, name: str) -> None:
        """Remove all versions and aliases that are known now."""
        self._add(name, None, ())

    def _add(self, name: str, version: str | None, aliases: tuple[str, ...]) -> Variant:
        known = self._documents(name)
        events = _union(known)
        turn = 1 + max((event.turn for event in events), default=0)
        event = _Event(turn=turn, id=uuid.uuid4().hex, at=int(time.time()), version=version, aliases=aliases)
        before, after = _fold(name, events), _fold(name, events | {event})
        if after != before:
            document = _Document(name=name, events=events | {event})
            self._store.put(f"{self._prefix}{name}/{event.id}.json", document.model_dump_json().encode())
            self._sweep(known)
        return after or Variant(name=name, aliases={}, versions=[])

    def _sweep(self, known: Documents) -> None:
        """Delete documents whose events were all in another one before this write.

        Those that only this write replaces stay until the next one, for readers that have listed but not yet read them.
        """
        for key, events in known.items():
            if any(events < other for other in known.values()):
                self._store.delete(key)

    def _documents(self, name: str) -> Documents:
        prefix = f"{self._prefix}{check_name(name)}/"
        for _ in range(_ATTEMPTS):
            keys = [key for key in self._store.list(prefix) if _KEY.fullmatch(key.removeprefix(self._prefix))]
            try:
                return {key: self._events(name, key) for key in keys}
            except ObjectNotFound:
                # Deleted between listing and reading: the document that replaced it exists by now.
                continue
        raise StoreConflict(f"variant {name!r} changes faster than it can be read: try again later")

    def _read_or_log(self, name: str, keys: Sequence[str]) -> Variant | None:
        try:
            try:
                return _fold(name, _union({key: self._events(name, key) for key in keys}))
            except ObjectNotFound:
                return self.read(name)
        except ManifestInvalid as error:
            logger.warning("variant %s is left out: %s", name, error.message)
            return None

    def _events(self, name: str, key: str) -> frozenset[_Event]:
        # Documents never change, so each is read only once.
        events = self._read_before.get(key)
        if events is None:
            where = f"{self._store.url}/{key}"
            try:
                document = _Document.model_validate_json(self._store.get(key, _MAX_DOCUMENT))
            except ValidationError as error:
                problem = error.errors()[0]["msg"]
                raise ManifestInvalid(
                    f"{where} is not the document of a variant ({problem}): delete it and publish again"
                ) from error
            if document.name != name:
                raise ManifestInvalid(f"{where} belongs to variant {document.name!r}: delete it and publish again")
            events = self._read_before[key] = document.events
        return events


def _union(documents: Documents) -> frozenset[_Event]:
    return frozenset[_Event]().union(*documents.values())


def _fold(name: str, events: Iterable[_Event]) -> Variant | None:
    """Apply the events in the order of their turns; None when the variant does not exist after them."""
    created: dict[str, int] = {}
    aliases: dict[str, str] = {}
    for event in sorted(events, key=lambda event: (event.turn, event.id)):
        if event.version is None:
            created.clear()
            aliases.clear()
        else:
            created.setdefault(event.version, event.at)
            aliases |= dict.fromkeys(event.aliases, event.version)
    return Variant(name=name, aliases=aliases, versions=list(created), created=created) if created else None
