"""The variants that clients may request: the store's, read periodically, and kept while the store is down."""

import asyncio
import logging
import time
from collections.abc import Callable, Sequence

from deltazip_deployments.router.heirs import Bring, Heirs
from deltazip_ray.artifact.catalog import Catalog, Variant
from deltazip_ray.artifact.names import VariantRef
from deltazip_ray.errors import DeltaZipError, StoreUnavailable, UnknownVariant, listed

logger = logging.getLogger(__name__)

_RETRY_S = 1.0


class Directory:
    """Names to versions. One refresh at a time; an unknown name may cause one, but not more often than each second."""

    def __init__(
        self,
        catalog: Catalog,
        base_name: str,
        refresh_s: float,
        bring: Bring,
        heir_wait_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``bring`` fetches versions that aliases move to; see :class:`Heirs`."""
        self._heirs = Heirs(bring, heir_wait_s, self._show, clock)
        self._found: dict[str, Variant] = {}
        """The store's variants; clients see ``_variants``."""
        self._catalog = catalog
        self._base_name = base_name
        self._refresh_s = refresh_s
        self._clock = clock
        self._variants: dict[str, Variant] | None = None
        self._refreshing: asyncio.Task[None] | None = None
        self._tried_at = float("-inf")
        self.problem: str | None = None
        """Why the last refresh failed; None when it worked."""

    async def keep_fresh(self) -> None:
        """Refresh forever, more often while the store is down."""
        while True:
            await self.refresh()
            await asyncio.sleep(self._refresh_s if self.problem is None else min(self._refresh_s, _RETRY_S))

    def close(self) -> None:
        """Stop waiting for versions."""
        self._heirs.close()

    async def refresh(self) -> None:
        """Read the variants; after a failure the known ones stay, and ``problem`` has the reason."""
        if self._refreshing is None or self._refreshing.done():
            self._refreshing = asyncio.create_task(self._read())
        await asyncio.shield(self._refreshing)

    @property
    def tried(self) -> bool:
        """Whether the store was read at least once, successfully or not."""
        return self._variants is not None or self.problem is not None

    async def variants(self) -> Sequence[Variant]:
        """All known variants, sorted by name; raises StoreUnavailable if the store has never answered."""
        await self._first_answer()
        return sorted(self._known().values(), key=lambda variant: variant.name)

    async def resolve(self, ref: VariantRef) -> str:
        """The version that a reference names; raises UnknownVariant, StoreUnavailable."""
        await self._first_answer()
        try:
            version = self._find(ref)
        except UnknownVariant:
            if self._clock() - self._tried_at < _RETRY_S:
                raise
            await self.refresh()
            version = self._find(ref)
        self._heirs.asked(version)
        return version

    async def _first_answer(self) -> None:
        if not self.tried:
            await self.refresh()

    async def _read(self) -> None:
        self._tried_at = self._clock()
        try:
            found = await asyncio.to_thread(self._catalog.variants)
        except DeltaZipError as error:
            if self.problem is None:
                logger.warning("the list of variants cannot be read: %s", error.message)
            self.problem = error.message
            return
        self._found = {variant.name: variant for variant in found}
        self._show()
        self.problem = None

    def _show(self) -> None:
        self._variants = self._heirs.held_back(self._variants or {}, self._found)

    def _known(self) -> dict[str, Variant]:
        if self._variants is None:
            raise StoreUnavailable(f"the list of variants could not be read yet: {self.problem}")
        return self._variants

    def _find(self, ref: VariantRef) -> str:
        known = self._known()
        variant = known.get(ref.name)
        if variant is None and ref.name == self._base_name:
            raise UnknownVariant(f"the base {ref.name!r} has neither aliases nor versions: ask for it without '@'")
        if variant is None:
            names = listed(sorted([self._base_name, *known]))
            raise UnknownVariant(f"there is no model {ref.name!r}; there are: {names}")
        return variant.resolve(ref.selector)
