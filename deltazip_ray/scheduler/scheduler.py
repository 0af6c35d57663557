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

There is no torch here and no lock: everything but ``validate`` belongs to the engine's step thread. How many requests
may wait is decided where they arrive, since those that wait for their delta are not here yet.
"""

from collections import deque
from collections.abc import Sequence

from deltazip_ray.config import EngineConfig
from deltazip_ray.errors import EngineError, InvalidRequest, PromptTooLong
from deltazip_ray.kvcache.block_manager import BlockManager
from deltazip_ray.scheduler.batch import Batch, Chunk
from deltazip_ray.scheduler.request import GenerateRequest, TokenChunk
from deltazip_ray.scheduler.sequence import SequenceState


class Scheduler:
    """A loop of ``schedule`` → run the batch → ``update``, with ``add`` and ``abort`` at any point between."""

    def __init__(self, config: EngineConfig) -> None:
        """Uses ``max_model_len``, ``max_batch_tokens``, ``max_running``, ``kv_blocks`` and ``block_size``."""
        self.blocks = BlockManager(config.kv_blocks, config.block_size)
        self._max_model_len = config.max_model_len
        self._max_batch_tokens = config.max_batch_tokens
        self._max_running = config.max_running
        self._sequences: dict[str, SequenceState] = {}
        self._running: list[SequenceState] = []
        self._waiting: deque[SequenceState] = deque()
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
        """Whether ``schedule`` would return something."""
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
        """Queue a request whose delta is in ``slot`` (-1: the base) and stays there until it is finished or aborted.

        Raises what ``validate`` raises, and InvalidRequest when a live request has the same id.
        """
        self.validate(request)
        if request.request_id in self._sequences:
            raise InvalidRequest(f"a request {request.request_id!r} is running already: give each its own id")
        sequence = SequenceState(request, slot)
        self._sequences[request.request_id] = sequence
        self._waiting.append(sequence)

    def abort(self, request_id: str) -> bool:
        """Forget a request and free its blocks, whatever its state; False when it is not here (any more).

        Between ``schedule`` and ``update`` too: its token of that step is dropped.
        """
        sequence = self._sequences.pop(request_id, None)
        if sequence is None:
            return False
        if sequence in self._running:
            self._running.remove(sequence)
            self.blocks.free(request_id)
        else:
            self._waiting.remove(sequence)
        return True

    def schedule(self) -> Batch:
        """Choose the next step's work. Nothing advances before ``update``; blocks are taken here."""
        self._grow_tables()
        budget = self._max_batch_tokens
        chunks = []
        for sequence in self._running:
            chunks.append(self._chunk(sequence, budget))
            budget -= len(chunks[-1].tokens)
        while budget and self._admit():
            chunks.append(self._chunk(self._running[-1], budget))
            budget -= len(chunks[-1].tokens)
        return Batch(tuple(sorted(chunks, key=lambda chunk: chunk.slot)))

    def update(self, batch: Batch, tokens: Sequence[int]) -> dict[str, TokenChunk]:
        """Record that ``batch`` ran, with one token for each of its ``sampling_chunks``, in their order.

        Returns what is new, by request id. Finished requests are gone when this returns. Raises EngineError when
        the number of tokens is wrong.
        """
        if len(tokens) != len(batch.sampling_chunks):
            raise EngineError(f"{len(tokens)} tokens for {len(batch.sampling_chunks)} sampling chunks")
        drawn = iter(tokens)
        news = {}
        for chunk in batch.chunks:
            token = next(drawn) if chunk.samples else None
            sequence = chunk.sequence
            if self._sequences.get(chunk.request_id) is not sequence:
                continue  # aborted while the step ran
            sequence.computed += len(chunk.tokens)
            if token is not None:
                reason = sequence.append(token)
                news[chunk.request_id] = TokenChunk(() if reason == "stop" else (token,), reason)
                if reason:
                    self.abort(chunk.request_id)
        return news

    def check(self) -> None:
        """Raise EngineError unless the books agree: every request in one place, every block accounted for."""
        self.blocks.check()
        known = [*self._running, *self._waiting]
        if len(known) != len(self._sequences) or {id(s) for s in known} != {id(s) for s in self._sequences.values()}:
            raise EngineError("requests do not add up; restart the replica and report this")
        held = sum(len(self.blocks.table(sequence.request.request_id)) for sequence in self._running)
        if held + self.blocks.free_blocks != self.blocks.num_blocks:
            raise EngineError("KV blocks are held by no running request; restart the replica and report this")

    def _grow_tables(self) -> None:
        """Give every running sequence the blocks of its tokens, oldest first, preempting from the youngest."""
        index = 0
        while index < len(self._running):
            sequence = self._running[index]
            if self.blocks.grow(sequence.request.request_id, len(sequence)):
                index += 1
            else:
                self._preempt(self._running.pop())

    def _preempt(self, sequence: SequenceState) -> None:
        self.blocks.free(sequence.request.request_id)
        sequence.computed = 0
        self._waiting.appendleft(sequence)
        self.preemptions += 1

    def _admit(self) -> bool:
        """Start the request at the head of the queue, if there is one and it fits."""
        if not self._waiting or len(self._running) >= self._max_running:
            return False
        sequence = self._waiting[0]
        if self.blocks.blocks_for(len(sequence)) > self.blocks.free_blocks - len(self._running):
            return False
        self.blocks.grow(sequence.request.request_id, len(sequence))
        self._running.append(self._waiting.popleft())
        return True

    def _chunk(self, sequence: SequenceState, budget: int) -> Chunk:
        count = min(sequence.pending, budget)
        start = sequence.computed
        return Chunk(
            sequence=sequence,
            tokens=tuple(sequence.tokens[start : start + count]),
            start=start,
            block_table=self.blocks.table(sequence.request.request_id),
            samples=count == sequence.pending,
        )
