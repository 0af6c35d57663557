"""Who gets how many tokens of a step.

Each running request has one token of ``max_batch_tokens``; a prefill under way gets of the rest what it can use, and
what is left goes to requests that begin now, as :mod:`~deltazip_ray.scheduler.fair_queue` has it: whose turn it is, or
nobody. One block of the cache stays free for each running request, lest one that begins preempts another at once.

*No prefill starves*: as nobody begins without a token to run, there are never more running requests than tokens in a
step, and all of them advance in every step. Behind an unfinished prefill nobody begins, so there is at most one.
Decodes never wait for it. It is cut where the prompts of its version are whole tiles of rows, since kernels multiply
these at once; the second and later ones of a step wait rather than be cut to nothing by that.
"""

from bisect import insort
from collections import Counter
from operator import attrgetter

from deltazip_ray.config import EngineConfig
from deltazip_ray.kvcache.block_manager import BlockManager
from deltazip_ray.scheduler.batch import TILE_ROWS
from deltazip_ray.scheduler.fair_queue import FairQueue
from deltazip_ray.scheduler.sequence import SequenceState

ROWS_AT_ONCE = 32
"""Decodes of one version that kernels serve in one pass over its delta (``deltazip_kernels.plan.MORE``)."""
_TILES_OF_A_STEP = 8
"""In steps of fewer tokens prompts are cut anywhere."""

_slot = attrgetter("slot")


class Admission:
    """Lets requests begin. A part of the :class:`~deltazip_ray.scheduler.scheduler.Scheduler`, whose state it uses."""

    def __init__(
        self, config: EngineConfig, blocks: BlockManager, queue: FairQueue, running: list[SequenceState]
    ) -> None:
        """``running``, by slot, gets those that begin."""
        self._blocks = blocks
        self._queue = queue
        self._running = running
        self._max_batch_tokens = config.max_batch_tokens
        self._max_running = config.max_running
        self._share_prefixes = config.kv_prefix_cache
        self._held: SequenceState | None = None
        self.prefill: SequenceState | None = None
        """The one that has more to run than the step that was shared out last."""
        self.short = False
        """Whether in that step a request could not begin for want of blocks."""
        self.prefix_lookups = 0
        """Tokens of requests that began, since the start."""
        self.prefix_hits = 0
        """Of those, tokens that were in the KV cache already."""

    def share_out(self) -> int:
        """Admit whom the step has room for. Returns the tokens of ``self.prefill``, which has more to run than that.

        All others that run have all of their pending tokens in the step.
        """
        self.short = False
        room = self._max_batch_tokens - len(self._running)
        last = self.prefill
        self.prefill = None
        if last is not None and last.table:
            if last.pending > room + 1:
                self.prefill = last
                return self._cut(last, room + 1) or room + 1
            room -= last.pending - 1
        while room and (last := self._admit(last, room)):
            if last.pending > room:
                self.prefill = last
                return self._cut(last, room) or room
            room -= last.pending
        return 0

    def _cut(self, prefill: SequenceState, room: int) -> int:
        """How many tokens of a ``prefill`` that has more than ``room`` run: as many as make whole tiles of rows with
        the other prompts of its version, if steps are so large that little is left unused; they may be none."""
        if prefill.slot < 0 or self._max_batch_tokens < _TILES_OF_A_STEP * TILE_ROWS:
            return room
        pending = [s.pending for s in self._running if s.slot == prefill.slot and s is not prefill and s.may_run]
        return max(room - (room + sum(tokens for tokens in pending if tokens > 1)) % TILE_ROWS, 0)

    def _admit(self, last: SequenceState | None, room: int) -> SequenceState | None:
        """Start the request whose turn it is, if there is one and it fits; ``last`` was prefilled before it.

        Behind others, one of which no tile of rows has ``room`` waits for the next step, where its version goes on.
        """
        before, self._held = last or self._held, None
        if not self._queue or len(self._running) == self._max_running:
            return None
        sequence = self._queue.first(self._filling(before))
        if sequence is None or sequence.drawing:
            return None  # One that was preempted just now is computed again with the token that is on its way.
        tokens = len(sequence)
        if last is not None and tokens > room and not self._cut(sequence, room):
            self._held = last
            return None
        names = sequence.names.first(sequence.reusable // self._blocks.block_size) if self._share_prefixes else []
        found = self._blocks.start(tokens, names, spare=len(self._running))
        if found is None:
            self.short = True
            return None
        sequence.table, sequence.named = found
        sequence.scheduled = sequence.named * self._blocks.block_size
        self.prefix_lookups += tokens
        self.prefix_hits += sequence.scheduled
        self._queue.admit(sequence, max(0, tokens - max(sequence.paid, sequence.scheduled)))
        sequence.paid = max(sequence.paid, tokens)
        insort(self._running, sequence, key=_slot)
        return sequence

    def _filling(self, last: SequenceState | None) -> SequenceState | None:
        """Of the version that may go on: ``last`` up to ROWS_AT_ONCE, or one that lacks one of them."""
        counts = Counter(map(_slot, self._running))
        if last is not None and counts[last.slot] % ROWS_AT_ONCE:
            return last
        lacking = (s for s in self._running if s.slot >= 0 and (counts[s.slot] + 1) % ROWS_AT_ONCE == 0)
        return next(filter(self._queue.waits, lacking), None)
