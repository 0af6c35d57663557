"""Continuous batching: which tokens of which requests run in the next step.

The rules, all in arrival order:

1. **Admission is first come, first served.** The waiting request that came first is admitted, or nobody is. So every
   running request came before every waiting one, always.
2. **Blocks.** An admitted request gets the KV blocks of all tokens it has at once, and later one block whenever a
   decode crosses into it. Admission leaves one block free for each running request, lest it preempts one at once.
3. **Tokens of a step.** Running sequences come first: one token for each decode, and for the prefill under way a chunk
   of what is left of ``max_batch_tokens``. The rest goes to requests that are admitted now.
   *No prefill starves*: as nobody is admitted without a token to run, there are never more running sequences than
   tokens in a step, and all of them advance in every step. An unfinished prefill leaves nothing to admit anybody
   with, so there is at most one, and it is the youngest: decodes never wait for it.
4. **Preemption.** When blocks run out, the youngest running request gives up all of its blocks and goes back to the
   head of the queue; it keeps its output and recomputes it as part of its prompt.
   *No livelock*: the oldest running request is never preempted, since alone it fits (see :meth:`Scheduler.validate`);
   it advances in every step, so it finishes, and then the next one is the oldest.
5. **One step ahead.** ``schedule`` may be called once more before ``update`` of the batch before, so that the host
   prepares a step while the device runs another. A decode then carries ``DRAWN``, the token that is on the device
   only. Left out are sequences whose last token is being drawn and those that must know it first
   (``SamplingParams.sequential``). That a sequence ended with a stop token is found one step late: the row in the
   batch on its way is wasted and its token dropped.
   *Blocks and slots stay safe.* The device runs batches in the order of their launch, and reads nothing of a batch
   after it ran. Blocks that a sequence gives up while a batch on its way still reads them go only to later batches,
   which write them later. Slots are written by others at any time, so the end of a request is told (``take_news``)
   when no batch on its way has it: until then its version is pinned.

There is no torch here and no lock: everything but ``validate`` belongs to the engine's step thread. How many requests
may wait is decided where they arrive, since those that wait for their delta are not here yet.
"""

from collections import deque
from collections.abc import Sequence

from deltazip_ray.config import CPU_KV_BLOCKS, EngineConfig
from deltazip_ray.errors import DeltaZipError, EngineError, InvalidRequest, PromptTooLong
from deltazip_ray.kvcache.block_manager import BlockManager
from deltazip_ray.scheduler.batch import DRAWN, Batch, Chunk, Drawn
from deltazip_ray.scheduler.request import GenerateRequest, TokenChunk
from deltazip_ray.scheduler.sequence import SequenceState

News = Sequence[tuple[str, TokenChunk | DeltaZipError | None]]
"""Request ids and what is new: what it got, why it failed, or None when it was aborted and nothing of it is left."""

_AHEAD = 2
"""Batches that may be on their way at once."""


class Scheduler:
    """A loop of ``schedule`` → launch the batch → ``update``, with ``add`` and ``abort`` at any point between."""

    def __init__(self, config: EngineConfig) -> None:
        """Uses ``max_model_len``, ``max_batch_tokens``, ``max_running``, ``kv_blocks`` and ``block_size``."""
        self.blocks = BlockManager(config.kv_blocks or CPU_KV_BLOCKS, config.block_size)
        self._max_model_len = config.max_model_len
        self._max_batch_tokens = config.max_batch_tokens
        self._max_running = config.max_running
        self._sequences: dict[str, SequenceState] = {}
        self._running: list[SequenceState] = []
        self._waiting: deque[SequenceState] = deque()
        self._on_the_way: deque[Batch] = deque()
        self._news: list[tuple[str, TokenChunk | DeltaZipError | None]] = []
        self._ends: dict[str, TokenChunk | DeltaZipError | None] = {}
        self.preemptions = 0
        """Preemptions since the start."""

    @property
    def num_running(self) -> int:
        """Requests that have KV blocks."""
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        """Requests that were added, or preempted, and have no KV blocks."""
        return len(self._waiting)

    @property
    def has_work(self) -> bool:
        """Whether there are requests whose end was not told; if no batch is on its way, ``schedule`` makes one."""
        return bool(self._sequences)

    def validate(self, request: GenerateRequest) -> None:
        """Refuse what could never run. Reads settings only, so any thread may call it.

        Raises InvalidRequest (empty prompt, nothing to generate) or PromptTooLong.
        """
        remaining = request.sampling.max_tokens - request.output_offset
        if not request.prompt:
            raise InvalidRequest("the prompt is empty: send at least one token")
        if not 0 <= request.output_offset < len(request.prompt) or remaining < 1:
            raise InvalidRequest(
                f"max_tokens is {request.sampling.max_tokens} with {request.output_offset} output tokens made: "
                "ask for at least one more, after a prompt of at least one"
            )
        total = len(request.prompt) + remaining
        if total > self._max_model_len:
            raise PromptTooLong(
                f"{len(request.prompt)} prompt tokens and up to {remaining} output tokens exceed the context of "
                f"{self._max_model_len}: shorten the prompt or lower max_tokens"
            )
        # The last token of the output is never fed back, so it needs no room.
        if self.blocks.blocks_for(total - 1) > self.blocks.num_blocks:
            raise PromptTooLong(
                f"{total} tokens exceed the KV cache of {self.blocks.num_blocks * self.blocks.block_size}: "
                "shorten the prompt, lower max_tokens or give the engine more kv_blocks"
            )

    def add(self, request: GenerateRequest, slot: int) -> None:
        """Queue a request whose delta is in ``slot`` (-1: the base) and stays there until its end is told.

        Raises what ``validate`` raises, and InvalidRequest when a live request has the same id.
        """
        self.validate(request)
        if request.request_id in self._sequences:
            raise InvalidRequest(f"a request {request.request_id!r} is running already: give each its own id")
        sequence = SequenceState(request, slot)
        self._sequences[request.request_id] = sequence
        self._waiting.append(sequence)

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
        able = [sequence for sequence in self._running if sequence.may_run]
        # Who sits out keeps its share, so that there are never more running sequences than tokens.
        budget = self._max_batch_tokens - (len(self._running) - len(able))
        chunks = []
        for sequence in able:
            chunks.append(self._chunk(sequence, budget))
            budget -= len(chunks[-1].tokens)
        while budget and self._admit():
            chunks.append(self._chunk(self._running[-1], budget))
            budget -= len(chunks[-1].tokens)
        batch = Batch(tuple(sorted(chunks, key=lambda chunk: chunk.slot)))
        if batch:
            self._on_the_way.append(batch)
            for row, chunk in enumerate(batch.sampling_chunks):
                chunk.sequence.row = row
        return batch

    def update(self, batch: Batch, drawn: Sequence[Drawn | None]) -> None:
        """Record that ``batch`` ran, with what it drew for its ``sampling_chunks``, in their order.

        None stands for logits that are not finite: that request fails. Raises EngineError when it is not the turn of
        this batch, or the number of tokens is wrong.
        """
        if len(drawn) != len(batch.sampling_chunks):
            raise EngineError(f"{len(drawn)} tokens for {len(batch.sampling_chunks)} sampling chunks")
        self._arrived(batch)
        for chunk, one in zip(batch.sampling_chunks, drawn, strict=True):
            sequence = chunk.sequence
            if sequence.over:
                continue
            if one is None:
                self._end(sequence, EngineError("the logits are not finite: the version is broken"))
                continue
            reason = sequence.append(one.token)
            if reason is None:
                self._news.append((chunk.request_id, one.chunk(None)))
            else:
                self._end(sequence, one.chunk(reason))

    def fail(self, batch: Batch, error: DeltaZipError) -> None:
        """Record that ``batch`` did not run: all of its requests end with ``error``. Raises as ``update`` does."""
        self._arrived(batch)
        for chunk in batch.chunks:
            if not chunk.sequence.over:
                self._end(chunk.sequence, error)

    def take_news(self) -> News:
        """What is new since the last call, in order. A request that finished, failed or was aborted is gone then."""
        news, self._news = self._news, []
        return news

    def check(self) -> None:
        """Raise EngineError unless the books agree: every request in one place, every block accounted for."""
        self.blocks.check()
        known = [*self._running, *self._waiting]
        live = [sequence for sequence in self._sequences.values() if not sequence.over]
        if len(known) != len(live) or {id(s) for s in known} != {id(s) for s in live}:
            raise EngineError("requests do not add up; restart the replica and report this")
        held = sum(len(sequence.table) for sequence in self._running)
        if held + self.blocks.free_blocks != self.blocks.num_blocks:
            raise EngineError("KV blocks are held by no running request; restart the replica and report this")

    def _arrived(self, batch: Batch) -> None:
        """Take ``batch`` off the way, and tell the ends that waited for it."""
        if not self._on_the_way or batch is not self._on_the_way[0]:
            raise EngineError("batches are updated in the order in which they were scheduled")
        self._on_the_way.popleft()
        for chunk in batch.chunks:
            sequence = chunk.sequence
            sequence.in_flight -= 1
            if sequence.over and not sequence.in_flight:
                self._tell_end(sequence, self._ends.pop(chunk.request_id))

    def _end(self, sequence: SequenceState, end: TokenChunk | DeltaZipError | None) -> None:
        """Free what a request holds, and tell its end as soon as nothing on its way needs its slot."""
        sequence.over = True
        if sequence in self._running:
            self._running.remove(sequence)
            self.blocks.free(sequence.request.request_id)
        else:
            self._waiting.remove(sequence)
        if sequence.in_flight:
            self._ends[sequence.request.request_id] = end
        else:
            self._tell_end(sequence, end)

    def _tell_end(self, sequence: SequenceState, end: TokenChunk | DeltaZipError | None) -> None:
        del self._sequences[sequence.request.request_id]
        self._news.append((sequence.request.request_id, end))

    def _grow_tables(self) -> None:
        """Give every running sequence the blocks of its tokens, oldest first, preempting from the youngest."""
        index = 0
        while index < len(self._running):
            sequence = self._running[index]
            if not sequence.may_run or self.blocks.grow(sequence.request.request_id, len(sequence)):
                index += 1
            else:
                self._preempt(self._running.pop())

    def _preempt(self, sequence: SequenceState) -> None:
        self.blocks.free(sequence.request.request_id)
        sequence.scheduled = 0
        self._waiting.appendleft(sequence)
        self.preemptions += 1

    def _admit(self) -> bool:
        """Start the request at the head of the queue, if there is one and it fits."""
        if not self._waiting or len(self._running) >= self._max_running:
            return False
        sequence = self._waiting[0]
        if sequence.drawing:
            return False  # Preempted just now: it is computed again with the token that is on its way.
        if self.blocks.blocks_for(len(sequence)) > self.blocks.free_blocks - len(self._running):
            return False
        self.blocks.grow(sequence.request.request_id, len(sequence))
        sequence.table = self.blocks.table(sequence.request.request_id)
        self._running.append(self._waiting.popleft())
        return True

    def _chunk(self, sequence: SequenceState, budget: int) -> Chunk:
        """The next tokens of a running sequence, which count as scheduled from now on."""
        count = min(sequence.pending, budget)
        start = sequence.scheduled
        chunk = Chunk(
            sequence=sequence,
            tokens=(DRAWN,) if sequence.drawing else tuple(sequence.tokens[start : start + count]),
            start=start,
            block_table=sequence.table,
            samples=count == sequence.pending,
            output_index=sequence.output_index,
            drawn_row=sequence.row if sequence.drawing else None,
        )
        sequence.scheduled += count
        sequence.in_flight += 1
        sequence.drawing = chunk.samples
        return chunk
