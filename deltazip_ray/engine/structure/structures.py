"""Compiles structures, once per structure and vocabulary, off the event loop and the step thread."""

import asyncio
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from deltazip_ray.engine.structure.grammars import Compiled, GrammarMatcher, Vocabulary, compile_structure
from deltazip_ray.errors import RequestTimeout
from deltazip_ray.once import Once
from deltazip_ray.scheduler.request import Matcher, Structure

GetVocabulary = Callable[[str | None], Awaitable[Vocabulary]]
"""The vocabulary of a version (None: the base), the same object for versions that share it. Raises DeltaZipError."""

_THREADS = 2
_TIMEOUT_S = 30.0
_COMPILED = 64
_PENDING = 32
"""Limit of queued compilations, also of those that nobody waits for any more: more would only time out."""


class Structures:
    """Makes matchers. Belongs to one event loop.

    Compilations cannot be interrupted. If it takes too long its request fails, and its thread stays busy until it ends.
    """

    def __init__(self, vocabulary: GetVocabulary, timeout_s: float = _TIMEOUT_S) -> None:
        self._vocabulary = vocabulary
        self._timeout_s = timeout_s
        pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="deltazip-structure")
        self._compiled = Once[tuple[Vocabulary, Structure], Compiled](_COMPILED, pool, _PENDING)

    async def matcher(self, version: str | None, structure: Structure) -> Matcher:
        """A matcher for one output of ``version``.

        Raises InvalidRequest for a structure that cannot be compiled or followed, RequestTimeout, Overloaded, and the
        errors of loading the version's vocabulary.
        """
        try:
            async with asyncio.timeout(self._timeout_s):
                vocabulary = await self._vocabulary(version)
                make = partial(compile_structure, structure, vocabulary)
                return GrammarMatcher(await self._compiled.get((vocabulary, structure), make))
        except TimeoutError:
            raise RequestTimeout(
                f"the structure was not compiled after {self._timeout_s:g} s: ask for a simpler one, or try again later"
            ) from None
