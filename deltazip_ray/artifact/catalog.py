"""The versions of one base in a store, and the variants that name them.

``<base digest>/blobs/sha256/<digest>``, ``<base digest>/versions/<version>.json`` and
``<base digest>/variants/<name>/<id>.json``. Knows no torch.
"""

from collections.abc import Callable, Collection

from deltazip_ray.artifact.digests import sha256_hex, verify_blob
from deltazip_ray.artifact.lossless import read_object
from deltazip_ray.artifact.manifest import (
    MAX_FILE,
    MAX_MANIFEST,
    BlobEntry,
    FileEntry,
    Manifest,
    blob_key,
    parse_manifest,
)
from deltazip_ray.artifact.names import LATEST, VariantRef, check_alias, check_digest, check_name, is_digest
from deltazip_ray.artifact.object_store import ObjectStore
from deltazip_ray.artifact.variants import Variant, VariantDocuments
from deltazip_ray.errors import (
    BaseMismatch,
    ObjectNotFound,
    UnknownVariant,
    listed,
)

__all__ = ["Catalog", "Variant", "bases"]


class Catalog:
    """What a store offers for one base. Blocking and thread-safe; every method raises StoreUnavailable."""

    def __init__(self, store: ObjectStore, base_digest: str) -> None:
        self.store = store
        self.base_digest = check_digest(base_digest)
        self._variants = VariantDocuments(store, f"{base_digest}/variants/")

    def publish(
        self,
        source: ObjectStore,
        manifest: Manifest,
        name: str,
        aliases: Collection[str] = (LATEST,),
        progress: Callable[[int], None] | None = None,
        repair: bool = False,
    ) -> Variant:
        """Copy the blobs of an artifact that are missing here, then its manifest, then add it to variant ``name``.

        Nobody sees the version before the last step, so an interrupted publication can simply be repeated.
        ``repair`` also copies blobs that exist already, which may be damaged.
        ``progress`` gets the size of each blob and file once it is in place; ``manifest.bytes_stored`` is their sum.
        Raises InvalidName, BaseMismatch, BlobCorrupt (the source's bytes differ from the manifest), ObjectNotFound,
        StoreFull. Concurrent publications under one name all take effect; if several move an alias, the last one wins.
        """
        check_name(name)
        for alias in aliases:
            check_alias(alias)
        self._check_base(manifest)
        self.store.create()
        for entry in manifest.stored:
            self._copy(source, entry, repair)
            if progress is not None:
                progress(entry.object_size)
        version = manifest.version()
        self.store.put(self._version_key(version), manifest.canonical())
        return self._variants.publish(name, version, aliases)

    def variants(self) -> list[Variant]:
        """All variants, sorted by name. Variants with a broken document are left out, and logged."""
        return self._variants.all()

    def variant(self, name: str) -> Variant:
        """The variant of that name; raises InvalidName, UnknownVariant (with those that exist), ManifestInvalid."""
        variant = self._variants.read(name)
        if variant is None:
            raise self._unknown(name)
        return variant

    def resolve(self, ref: VariantRef) -> str:
        """The version that a client's reference stands for; raises InvalidName, UnknownVariant."""
        return self.variant(ref.name).resolve(ref.selector)

    def manifest(self, version: str) -> Manifest:
        """A version's manifest, checked against its name.

        Raises InvalidName, ObjectNotFound, ManifestInvalid, BaseMismatch.
        """
        raw = self._get_named(self._version_key(check_digest(version)), version, MAX_MANIFEST)
        manifest = parse_manifest(raw, version)
        self._check_base(manifest)
        return manifest

    def set_alias(self, name: str, alias: str, selector: str) -> Variant:
        """Point ``alias`` of variant ``name`` at the version that ``selector`` (a version or another alias) names.

        Raises InvalidName, UnknownVariant.
        """
        check_alias(alias)
        return self._variants.publish(name, self.variant(name).resolve(selector), (alias,))

    def remove(self, name: str) -> None:
        """Remove a variant's name, aliases and list of versions.

        Manifests and blobs stay: other variants may share them. Raises InvalidName, UnknownVariant.
        """
        self.variant(name)
        self._variants.remove(name)

    def file(self, digest: str) -> bytes:
        """A file that travels with a version, by its digest; raises ObjectNotFound, BlobCorrupt."""
        data = self._get_named(self.blob_key(digest), digest, MAX_FILE)
        verify_blob(data, FileEntry(digest=digest, size=len(data)))
        return data

    def blob_key(self, digest: str) -> str:
        """Where in the store a blob or file is; raises InvalidName."""
        return f"{self.base_digest}/{blob_key(digest)}"

    def _get_named(self, key: str, digest: str, limit: int) -> bytes:
        """An object that should have this digest. If it differs it is read again: the network may have damaged it."""
        data = self.store.get(key, limit)
        return data if sha256_hex(data) == digest else self.store.get(key, limit)

    def _version_key(self, version: str) -> str:
        return f"{self.base_digest}/versions/{version}.json"

    def _check_base(self, manifest: Manifest) -> None:
        if manifest.base.digest != self.base_digest:
            raise BaseMismatch(
                f"the delta belongs to base {manifest.base.digest[:12]}, not to {self.base_digest[:12]}: "
                "use the base it was compressed against, or compress it against this one"
            )

    def _copy(self, source: ObjectStore, entry: BlobEntry | FileEntry, repair: bool) -> None:
        key = self.blob_key(entry.object_digest)
        if not repair and self._has(key, entry.object_size):
            return
        self.store.put(key, read_object(source, blob_key(entry.object_digest), entry))

    def _has(self, key: str, size: int) -> bool:
        try:
            return self.store.size(key) == size
        except ObjectNotFound:
            return False

    def _unknown(self, name: str) -> UnknownVariant:
        names = listed([variant.name for variant in self.variants()])
        return UnknownVariant(f"there is no variant {name!r}; there are: {names or 'none yet'}")


def bases(store: ObjectStore) -> list[str]:
    """Digests of the bases that a store has anything for, sorted."""
    return [name for name in store.folders() if is_digest(name)]
