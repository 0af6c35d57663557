"""Continuous batching: which tokens of which requests run in the next step.

1. **Admission**, and who gets how many tokens of a step: :mod:`~deltazip_ray.scheduler.admission`.
2. **Blocks.** An admitted request shares the KV blocks of the longest prefix that is in the cache, gets those of all
   its other tokens at once, and later one whenever a decode crosses into it. Blocks are shared from ``update`` of the
   batch on that filled them.
3. **Preemption.** When blocks run out, the running request that is last in the queue's order of arrival and priority
   gives up its blocks and waits again; it keeps its output and computes it again as part of its prompt.
   *No livelock*: the first one in that order is never preempted, since alone it fits (see ``limits``);
   it advances in every step, so it finishes. *No starvation*: priorities age, so everybody is the first in time.
   Blocks that were lent to the cache are taken back at any time, from whoever holds them (:meth:`take_back`).
4. **One step ahead.** ``schedule`` may be called once more before ``update`` of the batch before, so that the host
   prepares a step while the device runs another. A decode then carries ``DRAWN``, the token that is on the device
   only. Left out are requests whose last token is being drawn, and those that must know it first
   (``SamplingParams.sequential``). That one ended with a stop token is found a step late: the row in the batch on its
   way is wasted and its token dropped.
   *Blocks and slots stay safe.* The device runs batches in the order of their launch, and reads nothing of a batch
   after it ran. Blocks that a request gives up while a batch on its way uses them go only to later batches, which
   write them later. Slots are written by others at any time, so the end of a request is told (``take_news``) when no
   batch on its way has it: until then its version stays where it is.

There is no torch here and no lock: everything but ``limits`` belongs to the engine's step thread. How many requests
may wait is decided where they arrive, since those that wait for their delta are not here yet.
"""

from array import array
from collections import deque
from collections.abc import Sequence
from operator import attrgetter

from deltazip_ray.config import CPU_KV_BLOCKS, EngineConfig
from deltazip_ray.errors import DeltaZipError, EngineError, InvalidRequest
from deltazip_ray.kvcache.block_manager import BlockManager
from deltazip_ray.scheduler.admission import Admission
from deltazip_ray.scheduler.batch import Batch, Drawn, Scores, next_chunk
from deltazip_ray.scheduler.fair_queue import FairQueue
from deltazip_ray.scheduler.limits import Limits
from deltazip_ray.scheduler.outbox import End, News, Outbox
from deltazip_ray.scheduler.request import GenerateRequest
from deltazip_ray.scheduler.sequence import SequenceState

_AHEAD = 2
"""Batches that may be on their way at once."""
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
        """Requests that were added, or preempted, and have no KV blocks."""
        return len(self._queue)

    @property
    def has_work(self) -> bool:
        """Whether there are requests whose end was not told; if no batch is on its way, ``schedule`` makes one."""
        return bool(self._sequences)

    def add(self, request: GenerateRequest, slot: int) -> None:
        """Queue a request whose delta is in ``slot`` (-1: the base) and stays there until its end is told.

        Raises what ``limits.check`` raises, and InvalidRequest when a live request has the same id.
        """
        self.limits.check(request)
        if request.request_id in self._sequences:
            raise InvalidRequest(f"a request {request.request_id!r} is running already: give each its own id")
        sequence = SequenceState(request, slot, self._block_size)
        self._sequences[request.request_id] = sequence
        self._queue.add(sequence)

    def abort(self, request_id: str) -> None:
        """Forget a request and free its blocks, whatever its state; one that is over already is fine.

        Its end, None, is told when no batch on its way has it; what those bring for it is dropped.
        """
        sequence = self._sequences.get(request_id)
        if sequence is not None and not sequence.over:
            self._end(sequence, None)

    def schedule(self) -> Batch:
        """Choose the next step's work; blocks are taken here. Empty when all that may run is on its way.

        Raises EngineError when two batches are on their way already.
        """
        if len(self._on_the_way) == _AHEAD:
            raise EngineError(f"{_AHEAD} batches are on their way: call update first")
        self._grow_tables()
        cut, prefill = self.admission.share_out(), self.admission.prefill
        chunks = []
        for sequence in self._running:
            if sequence.may_run:
                pending = sequence.pending
                chunks.append(next_chunk(sequence, cut if sequence is prefill else pending, pending))
        batch = Batch.of(chunks)
        for row, chunk in enumerate(batch.sampling_chunks):
            chunk.sequence.row = row
        if chunks:
            self._on_the_way.append(batch)
        return batch

    def take_back(self, blocks: range) -> None:
        """Take blocks that were lent away from the requests that hold them, and from the cache.

        Raises EngineError while a batch is on its way, which may read them.
        """
        if self._on_the_way:
            raise EngineError("a batch is on its way: call update first")
        for sequence in [s for s in self._running if any(block in blocks for block in s.table)]:
            self._preempt(sequence)
        self.blocks.take_back(blocks)

    def update(self, batch: Batch, drawn: Sequence[Drawn | None], scores: Sequence[Scores] = ()) -> None:
        """Record that ``batch`` ran, with what it drew for its ``sampling_chunks``, in their order.

        ``scores``: of its ``scoring_chunks``. None stands for logits that are not finite: that request fails. Raises
        EngineError when it is not the turn of this batch, or the number of tokens is wrong.
        """
        if len(drawn) != len(batch.sampling_chunks):
            raise EngineError(f"{len(drawn)} tokens for {len(batch.sampling_chunks)} sampling chunks")
        self._arrived(batch)
        if scores:
            self._take_scores(batch, scores)
        results = iter(drawn)
        for chunk in batch.chunks:
            sequence, samples = chunk.sequence, chunk.samples
            one = next(results) if samples else None
            if sequence.over:
                continue
            if samples and one is None:
                self._end(sequence, _undrawable(sequence))
                continue
            full = (chunk.start + len(chunk.tokens)) // self._block_size
            if full > sequence.named and chunk.block_table is sequence.table:
                self._name_blocks(sequence, full)
            if one is not None:
                self._record(sequence, one)

    def fail(self, batch: Batch, error: DeltaZipError) -> None:
        """Record that ``batch`` did not run: all of its requests end with ``error``. Raises as ``update`` does."""
        self._arrived(batch)
        for chunk in batch.chunks:
            if not chunk.sequence.over:
                self._end(chunk.sequence, error)

    def take_news(self, turns: int | None = None) -> News:
        """What is new since the last call, in order. A request that finished, failed or was aborted is gone then.

        A request's first tokens and its end are told at once, those between to at most ``turns`` requests, the ones
        that wait longest, if there are more.
        """
        return self._outbox.take(turns)

    def check(self) -> None:
        """Raise EngineError unless the books agree: every request in one place, every block accounted for."""
        self.blocks.check(sequence.table for sequence in self._running)
        known = [*self._running, *self._queue, *self._outbox.ending]
        if len(known) != len(self._sequences) or {id(s) for s in known} != {id(s) for s in self._sequences.values()}:
            raise EngineError("requests do not add up; restart the replica and report this")

    def _grow_tables(self) -> None:
        """Give every request that may run the blocks of its tokens, preempting as it takes."""
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
        """Charge the version of a running request for its first ``tokens`` tokens, unless that was done."""
        if tokens > sequence.paid:
            self._queue.charge(sequence, tokens - sequence.paid)
            sequence.paid = tokens

    def _arrived(self, batch: Batch) -> None:
        """Take ``batch`` off the way, and tell the ends that waited for it."""
        if not self._on_the_way or batch is not self._on_the_way[0]:
            raise EngineError("batches are updated in the order in which they were scheduled")
        self._on_the_way.popleft()
        for chunk in batch.chunks:
            sequence = chunk.sequence
            sequence.in_flight -= 1
            if sequence.over and not sequence.in_flight:
                self._forget(sequence)

    def _name_blocks(self, sequence: SequenceState, full: int) -> None:
        """Let others share the first ``full`` blocks of a running request."""
        if self._share_prefixes:
            names = sequence.names.first(full)
            for i in range(sequence.named, full):
                self.blocks.name(sequence.table[i], names[i])
            sequence.named = full

    def _take_scores(self, batch: Batch, scores: Sequence[Scores]) -> None:
        """Keep log-probabilities of prompts until the first token of their request comes."""
        for chunk, found in zip(batch.scoring_chunks, scores, strict=True):
            sequence = chunk.sequence
            if sequence.over:
                continue
            if found is None:
                self._end(sequence, EngineError(_NOT_FINITE))
            else:
                sequence.scores.extend(found)

    def _record(self, sequence: SequenceState, drawn: Drawn) -> None:
        """Take the next token of a request, and with the last one its end."""
        reason = sequence.append(drawn.token)
        if drawn.logprobs is not None:
            sequence.logprobs.append(drawn.logprobs)
        if reason is not None:
            told = drawn.token if reason == "stop" and drawn.logprobs is not None else None
            self._end(sequence, sequence.tell(reason, told))
        else:
            self._outbox.put(sequence)

    def _end(self, sequence: SequenceState, end: End) -> None:
        """Free what a request holds, and tell its end as soon as nothing on its way needs its slot."""
        sequence.over = True
        self._outbox.end(sequence, end)
        if not sequence.table:
            self._queue.remove(sequence)
        else:
            if isinstance(end, DeltaZipError):
                self.blocks.forget(sequence.table)
            self._release(sequence)
        if not sequence.in_flight:
            self._forget(sequence)

    def _release(self, sequence: SequenceState) -> None:
        """Take a running request off its blocks; batches on their way keep the old table."""
        self._running.remove(sequence)
        self.blocks.free(sequence.table)
        sequence.table = array("i")

    def _forget(self, sequence: SequenceState) -> None:
        """Tell the end of a request that no batch on its way has."""
        del self._sequences[sequence.request.request_id]
        self._outbox.tell_end(sequence)


def _undrawable(sequence: SequenceState) -> DeltaZipError:
    """Why no token could be drawn."""
    if sequence.request.matcher is not None:
        return InvalidRequest("no token of this model continues the structure: ask for one that it can write")
    return EngineError(_NOT_FINITE)
