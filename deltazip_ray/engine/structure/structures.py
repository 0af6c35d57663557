"""Structured output: each structure is compiled once for a version, beside the event loop and the steps."""

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Hashable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Generic, TypeVar

import xgrammar

from deltazip_ray.engine.structure.grammars import Compiled, GrammarMatcher, Vocabulary, compile_structure
from deltazip_ray.errors import RequestTimeout
from deltazip_ray.scheduler.request import Matcher, Structure

LoadVocabulary = Callable[[str | None], xgrammar.TokenizerInfo]
"""The vocabulary of a version (None: the base). Blocking; raises DeltaZipError."""

_THREADS = 2
_TIMEOUT_S = 30.0
_VOCABULARIES = 16  # about 10 MB each for 128,000 tokens
_COMPILED = 64

_K = TypeVar("_K", bound=Hashable)
_T = TypeVar("_T")


class _Once(Generic[_K, _T]):
    """Results of work in threads, by key: made once however many ask, the least recently used dropped."""

    def __init__(self, pool: ThreadPoolExecutor, capacity: int) -> None:
        self._pool = pool
        self._capacity = capacity
        self._made: OrderedDict[_K, asyncio.Future[_T]] = OrderedDict()

    async def get(self, key: _K, make: Callable[[], _T]) -> _T:
        """What ``make`` returns; what it raises, and then the next call tries again."""
        made = self._made.get(key)
        if made is None or (made.done() and (made.cancelled() or made.exception() is not None)):
            made = self._made[key] = asyncio.get_running_loop().run_in_executor(self._pool, make)
        self._made.move_to_end(key)
        while len(self._made) > self._capacity:
            self._made.popitem(last=False)
        # A client that leaves must not cancel the work for the others.
        return await asyncio.shield(made)


class Structures:
    """Makes matchers. Belongs to one event loop.

    A compilation cannot be interrupted: one that takes too long fails its request, and keeps its thread until it ends.
    """

    def __init__(self, load: LoadVocabulary, timeout_s: float = _TIMEOUT_S) -> None:
        self._load = load
        self._timeout_s = timeout_s
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="deltazip-structure")
        self._vocabularies: _Once[str | None, Vocabulary] = _Once(self._pool, _VOCABULARIES)
        self._compiled: _Once[tuple[str | None, Structure], Compiled] = _Once(self._pool, _COMPILED)

    async def matcher(self, version: str | None, structure: Structure) -> Matcher:
        """What follows one output of ``version``.

        Raises InvalidRequest for a structure that cannot be compiled or followed, RequestTimeout, and what loading the
        version's vocabulary raises.
        """
        try:
            async with asyncio.timeout(self._timeout_s):
                vocabulary = await self._vocabularies.get(version, lambda: Vocabulary.of(self._load(version)))
                make = partial(compile_structure, structure, vocabulary)
                return GrammarMatcher(await self._compiled.get((version, structure), make))
        except TimeoutError:
            raise RequestTimeout(
                f"the structure was not compiled after {self._timeout_s:g} s: ask for a simpler one, or try again later"
            ) from None
