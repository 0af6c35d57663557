"""From parameters and a seed to a trace."""

from collections.abc import Iterator
from itertools import count

import numpy as np

from deltazip_loadgen.arrivals import arrivals
from deltazip_loadgen.prompts import Prompt, PromptPool, Shuffled, sample_length, synthetic
from deltazip_loadgen.spec import TraceSpec
from deltazip_loadgen.trace import TraceHeader, TraceRequest


class GeneratedTrace:
    """A trace that is made while it is read; every iteration gives the same requests.

    Arrivals, prompts, lengths and sampling seeds draw from streams of their own, so that two traces which
    differ in one parameter share everything else.
    """

    def __init__(self, spec: TraceSpec, seed: int, pool: PromptPool | None = None) -> None:
        """Draws the arrivals; raises :class:`PoolInvalid` when a model has no prompt in the pool."""
        self.spec = spec if pool is None else spec.model_copy(update={"pool": pool.ref})
        self.seed = seed
        self._pool = None if pool is None else {model: pool.of(model) for model in spec.models}
        arrival_seed, *self._seeds = np.random.SeedSequence(seed).spawn(4)
        self._arrivals = arrivals(spec, arrival_seed)

    def __len__(self) -> int:
        return len(self._arrivals)

    @property
    def header(self) -> TraceHeader:
        """The header that lets a reader make the same trace again."""
        parameters = self.spec.model_dump(mode="json", exclude_none=True)
        return TraceHeader(seed=self.seed, generator=parameters, requests=len(self))

    def __iter__(self) -> Iterator[TraceRequest]:
        prompts = self._prompts(self._seeds[0])
        lengths, sampling = (np.random.default_rng(state) for state in self._seeds[1:])
        for at_s, index in self._arrivals:
            prompt = prompts.next(index)
            drawn = sample_length(self.spec.max_tokens, lengths)
            yield TraceRequest(
                at_s=round(at_s, 6),
                model=self.spec.models[index],
                endpoint=prompt.endpoint,
                messages=prompt.messages,
                prompt=prompt.prompt,
                max_tokens=prompt.max_tokens or drawn,
                temperature=self.spec.temperature,
                seed=int(sampling.integers(2**31)) if self.spec.temperature > 0 else None,
                tags=prompt.tags,
                expected=prompt.expected,
            )

    def _prompts(self, seed: np.random.SeedSequence) -> "_FromPool | _Synthetic":
        if self._pool is None:
            return _Synthetic(self.spec, np.random.default_rng(seed))
        # Not spawn(): it counts its children, and a second iteration would get others.
        states = (np.random.SeedSequence(seed.entropy, spawn_key=(*seed.spawn_key, i)) for i in count())
        pairs = zip(self.spec.models, states, strict=False)
        return _FromPool([Shuffled(self._pool[model], np.random.default_rng(state)) for model, state in pairs])


class _Synthetic:
    def __init__(self, spec: TraceSpec, rng: np.random.Generator) -> None:
        self._spec = spec
        self._rng = rng

    def next(self, index: int) -> Prompt:
        return synthetic(self._spec.endpoint, sample_length(self._spec.prompt_words, self._rng), self._rng)


class _FromPool:
    def __init__(self, by_model: list[Shuffled]) -> None:
        self._by_model = by_model

    def next(self, index: int) -> Prompt:
        return self._by_model[index].next()
