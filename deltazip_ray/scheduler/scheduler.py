"""Continuous batching: which tokens of which requests run in the next step.

1. **Admission** and the division of a step's tokens: see :mod:`~deltazip_ray.scheduler.admission`.
2. **Blocks.** An admitted request shares the KV blocks of its longest cached prefix and gets blocks for all its other
   tokens at once; decodes get one more whenever they need it. Other requests can share a block after ``update`` of the
   batch that filled it.
3. **Preemption.** When blocks run out, the running request that is last by arrival and priority loses its blocks and
   waits again. It keeps its output, which is computed again as part of its prompt.
   *No livelock*: the first request in that order is never preempted, since it fits when alone (see ``limits``); it
   advances in every step, so it finishes. *No starvation*: priorities age, so every request becomes the first in time.
   Blocks lent to the cache can be taken back at any time, whoever holds them (:meth:`take_back`).
4. **One step ahead.** ``schedule`` may be called again before ``update`` of the previous batch, so that the host
   prepares a step while the device runs another. A decode then carries ``DRAWN`` for the token that exists on the
   device only. Requests are left out whose last token is being sampled, or whose next draw depends on it
   (``SamplingParams.sequential``). A stop token is noticed one step late: its request's row in the next batch is wasted
   and the token dropped.
   *Why this is safe*: the device runs batches in launch order, and reads nothing of a batch after it ran. So blocks
   released while a launched batch still uses them can only be written by later batches. Slots, however, are written by
   loads at any time. So the end of a request is reported (``take_news``) when no launched batch contains it; until then
   its version stays in its slot.

There is no torch here and no lock: everything except ``limits`` belongs to the engine's step thread. The number of
waiting requests is limited where they arrive, as those that wait for their delta are not here yet.
"""

import sys
from array import array
from collections import deque
from collections.abc import Sequence
from operator import attrgetter

from deltazip_ray.config import CPU_KV_BLOCKS, EngineConfig
from deltazip_ray.errors import DeltaZipError, EngineError, InvalidRequest
from deltazip_ray.kvcache.block_manager import BlockManager
from deltazip_ray.scheduler.admission import Admission
from deltazip_ray.scheduler.batch import NOT_FINITE, Batch, Drawn, Scores, next_chunk
from deltazip_ray.scheduler.fair_queue import FairQueue
from deltazip_ray.scheduler.limits import Limits
from deltazip_ray.scheduler.outbox import End, News, Outbox
from deltazip_ray.scheduler.request import GenerateRequest
from deltazip_ray.scheduler.sequence import SequenceState

_AHEAD = 2
"""Batches that may be in flight at once."""
_NOT_FINITE = "the logits are not finite: the version is broken"

_order = attrgetter("order")


class Scheduler:
    """A loop of ``schedule`` → launch the batch → ``update``, with ``add`` and ``abort`` at any point between."""

    def __init__(self, config: EngineConfig) -> None:
        """Uses the limits, the settings of the KV cache and those of fairness."""
        self.blocks = BlockManager(config.kv_blocks or CPU_KV_BLOCKS, config.block_size)
        self.limits = Limits(config.max_model_len, self.blocks.num_blocks * config.block_size)
        self._block_size = config.block_size
        self._share_prefixes = config.kv_prefix_cache
        self._queue = FairQueue(config.fair_lead_tokens, config.priority_step_tokens, config.max_batch_tokens)
        self._sequences: dict[str, SequenceState] = {}
        self._running: list[SequenceState] = []  # by slot
        self.admission = Admission(config, self.blocks, self._queue, self._running)
        self._on_the_way: deque[Batch] = deque()
        self._outbox = Outbox()
        self.preemptions = 0
        """Preemptions since the start."""

    @property
    def num_running(self) -> int:
        """Requests that have KV blocks."""
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        """Requests without KV blocks: not admitted yet, or preempted."""
        return len(self._queue)

    @property
    def has_work(self) -> bool:
        """Whether there are requests whose end was not reported; if no batch is in flight, ``schedule`` makes one."""
        return bool(self._sequences)

    def add(self, request: GenerateRequest, slot: int) -> None:
        """Queue a request whose delta is in ``slot`` (-1: the base) and stays there until its end is reported.

        Raises what ``limits.check`` raises, and InvalidRequest when a live request has the same id.
        """
        self.limits.check(request)
        if request.request_id in self._sequences:
            raise InvalidRequest(f"a request {request.request_id!r} is running already: give each its own id")
        sequence = SequenceState(request, slot, self._block_size)
        self._sequences[request.request_id] = sequence
        self._queue.add(sequence)

    def abort(self, request_id: str) -> None:
        """End a request and free its blocks, in any state; does nothing if it has ended already.

        Its end, None, is reported when no batch in flight contains it; tokens that these sample for it are dropped.
        """
        sequence = self._sequences.get(request_id)
        if sequence is not None and not sequence.over:
            self._end(sequence, None)

    def schedule(self) -> Batch:
        """Choose the next step's work and allocate its blocks. Empty when everything that may run is in flight.

        Raises EngineError when two batches are in flight already.
        """
        if len(self._on_the_way) == _AHEAD:
            raise EngineError(f"{_AHEAD} batches are in flight: call update first")
        self._grow_tables()
        cut, prefill = self.admission.share_out(), self.admission.prefill
        chunks = [next_chunk(s, cut if s is prefill else None) for s in self._running if s.may_run]
        batch = Batch.of(chunks)
        for row, chunk in enumerate(batch.sampling_chunks):
            chunk.sequence.row = row
        if chunks:
            self._on_the_way.append(batch)
        return batch

    def take_back(self, blocks: range) -> None:
        """Remove lent blocks from the cache, preempting the requests that hold them.

        Raises EngineError while a batch is in flight, as it may read them.
        """
        if self._on_the_way:
            raise EngineError("a batch is in flight: call update first")
        for sequence in [s for s in self._running if any(block in blocks for block in s.table)]:
            self._preempt(sequence)
        self.blocks.take_back(blocks)

    def update(self, batch: Batch, drawn: Drawn, scores: Sequence[Scores] = ()) -> None:
        """Record that ``batch`` ran, with what was sampled for its ``sampling_chunks``.

        ``scores``: of its ``scoring_chunks``. Requests whose logits are not finite fail. Raises EngineError when it is
        not the turn of this batch, or the number of tokens is wrong.
        """
        if len(drawn.tokens) != len(batch.sampling_chunks):
            raise EngineError(f"{len(drawn.tokens)} tokens for {len(batch.sampling_chunks)} sampling chunks")
        self._land(batch)
        if scores:
            self._take_scores(batch, scores)
        for row, logprobs in drawn.logprobs.items():
            if drawn.tokens[row] != NOT_FINITE:
                batch.sampling_chunks[row].sequence.logprobs.append(logprobs)
        sampled, size = iter(drawn.tokens), self._block_size if self._share_prefixes else sys.maxsize
        for sequence, tokens, start, table, samples, _, _ in batch.chunks:
            token = next(sampled) if samples else None
            sequence.in_flight -= 1
            if sequence.over:
                self._forget_unless_in_flight(sequence)
                continue
            if token == NOT_FINITE:
                self._end(sequence, _undrawable(sequence))
                continue
            full = (start + len(tokens)) // size
            if full > sequence.named and table is sequence.table:
                self._name_blocks(sequence, full)
            if token is not None:
                self._record(sequence, token)

    def fail(self, batch: Batch, error: DeltaZipError) -> None:
        """Record that ``batch`` did not run: all of its requests end with ``error``. Raises as ``update`` does."""
        self._land(batch)
        for chunk in batch.chunks:
            sequence = chunk.sequence
            sequence.in_flight -= 1
            if sequence.over:
                self._forget_unless_in_flight(sequence)
            else:
                self._end(sequence, error)

    def take_news(self, turns: int | None = None) -> News:
        """New tokens and ends since the last call, in order. After its end a request is forgotten.

        A request's first tokens and its end are told at once, those between to at most ``turns`` requests, the ones
        that wait longest, if there are more.
        """
        return self._outbox.take(turns)

    def check(self) -> None:
        """Raise EngineError unless every request is in exactly one place and every block is accounted for."""
        self.blocks.check(sequence.table for sequence in self._running)
        known = [*self._running, *self._queue, *self._outbox.ending]
        if len(known) != len(self._sequences) or {id(s) for s in known} != {id(s) for s in self._sequences.values()}:
            raise EngineError("requests do not add up; restart the replica and report this")

    def _grow_tables(self) -> None:
        """Give every request that may run the blocks for its tokens, preempting others if needed."""
        size = self._block_size
        short = [s for s in self._running if s.length > len(s.table) * size and s.may_run]
        for sequence in short:
            while sequence.table and not self.blocks.grow(sequence.table, len(sequence)):
                self._preempt(max(self._running, key=_order))
            self._pay(sequence, len(sequence.table) * size)

    def _preempt(self, sequence: SequenceState) -> None:
        self._release(sequence)
        sequence.scheduled = 0
        self._queue.add(sequence)
        self.preemptions += 1

    def _pay(self, sequence: SequenceState, tokens: int) -> None:
        """Charge the version of a running request for its first ``tokens`` tokens, less what was charged before."""
        if tokens > sequence.paid:
            self._queue.charge(sequence, tokens - sequence.paid)
            sequence.paid = tokens

    def _land(self, batch: Batch) -> None:
        """Remove ``batch`` from those in flight."""
        if not self._on_the_way or batch is not self._on_the_way[0]:
            raise EngineError("batches are updated in the order in which they were scheduled")
        self._on_the_way.popleft()

    def _name_blocks(self, sequence: SequenceState, full: int) -> None:
        """Let others share the first ``full`` blocks of a running request."""
        names = sequence.names.first(full)
        for i in range(sequence.named, full):
            self.blocks.name(sequence.table[i], names[i])
        sequence.named = full

    def _take_scores(self, batch: Batch, scores: Sequence[Scores]) -> None:
        """Keep log-probabilities of prompts until the first token of their request."""
        for chunk, found in zip(batch.scoring_chunks, scores, strict=True):
            sequence = chunk.sequence
            if sequence.over:
                continue
            if found is None:
                self._end(sequence, EngineError(_NOT_FINITE))
            else:
                sequence.scores.extend(found)

    def _record(self, sequence: SequenceState, token: int) -> None:
        """Append a sampled token to its request; the last one ends it."""
        reason = sequence.append(token)
        if reason is None:
            self._outbox.put(sequence)
        else:
            told = token if reason == "stop" and sequence.logprobs else None
            self._end(sequence, sequence.tell(reason, told))

    def _end(self, sequence: SequenceState, end: End) -> None:
        """Free a request's blocks, and report its end as soon as no batch in flight needs its slot."""
        sequence.over = True
        self._outbox.end(sequence, end)
        if not sequence.table:
            self._queue.remove(sequence)
        else:
            if isinstance(end, DeltaZipError):
                self.blocks.forget(sequence.table)
            self._release(sequence)
        self._forget_unless_in_flight(sequence)

    def _release(self, sequence: SequenceState) -> None:
        """Take the blocks of a running request; batches in flight keep the old table."""
        self._running.remove(sequence)
        self.blocks.free(sequence.table)
        sequence.table = array("i")

    def _forget_unless_in_flight(self, sequence: SequenceState) -> None:
        """Report the end of a request, unless a batch in flight contains it."""
        if not sequence.in_flight:
            del self._sequences[sequence.request.request_id]
            self._outbox.tell_end(sequence)


def _undrawable(sequence: SequenceState) -> DeltaZipError:
    """Why no token could be sampled."""
    if sequence.request.matcher is not None:
        return InvalidRequest(
            "no token of this model continues the structure, or it is too slow to follow: ask for a simpler one"
        )
    return EngineError(_NOT_FINITE)
