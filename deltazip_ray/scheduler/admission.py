"""Divides the tokens of a step among requests, and admits new ones.

Each running request gets one of the ``max_batch_tokens``. An unfinished prefill gets as much of the rest as it can use.
The remainder goes to new requests in the order of :mod:`~deltazip_ray.scheduler.fair_queue`: if the next one does not
fit, no other one is admitted. One KV block stays free per running request, so that a new request does not cause a
preemption at once.

*No prefill starves*: every admitted request has a token to run, so there are never more running requests than tokens in
a step, and all of them advance in every step. Nothing is admitted behind an unfinished prefill, so there is at most
one, and decodes never wait for it. It is cut where the prompts of its version fill whole tiles of rows, which kernels
multiply at once; if that would leave nothing of a further prompt in this step, that prompt waits for the next one.
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
"""With fewer tiles in a step, prompts are cut anywhere."""

_slot = attrgetter("slot")


class Admission:
    """Admits requests. A part of :class:`~deltazip_ray.scheduler.scheduler.Scheduler`, whose state it modifies."""

    def __init__(
        self, config: EngineConfig, blocks: BlockManager, queue: FairQueue, running: list[SequenceState]
    ) -> None:
        """Admitted requests are added to ``running``, which is sorted by slot."""
        self._blocks = blocks
        self._queue = queue
        self._running = running
        self._max_batch_tokens = config.max_batch_tokens
        self._max_running = config.max_running
        self._share_prefixes = config.kv_prefix_cache
        self._held: SequenceState | None = None
        self.prefill: SequenceState | None = None
        """The prefill that did not fit into the last step as a whole."""
        self.short = False
        """Whether a request could not be admitted to the last step because KV blocks were missing."""
        self.prefix_lookups = 0
        """Tokens of admitted requests, since the start."""
        self.prefix_hits = 0
        """Of those, tokens found in the prefix cache."""

    def share_out(self) -> int:
        """Admit requests to the next step. Returns how many tokens of ``self.prefill`` run in it.

        All other running requests have all of their pending tokens in the step.
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
        """How many tokens of a ``prefill`` with more than ``room`` tokens to run: as many as fill whole tiles of rows,
        together with other prompts of its version, if steps are large enough to waste little; perhaps none."""
        if prefill.slot < 0 or self._max_batch_tokens < _TILES_OF_A_STEP * TILE_ROWS:
            return room
        pending = [s.pending for s in self._running if s.slot == prefill.slot and s is not prefill and s.may_run]
        return max(room - (room + sum(tokens for tokens in pending if tokens > 1)) % TILE_ROWS, 0)

    def _admit(self, last: SequenceState | None, room: int) -> SequenceState | None:
        """Admit the next request of the queue, if it fits; ``last`` is the prefill before it in this step, if any.

        If ``room`` after another prefill is less than a tile of rows, the request waits for the next step, which then
        continues with the version of ``last``.
        """
        before, self._held = last or self._held, None
        if not self._queue or len(self._running) == self._max_running:
            return None
        sequence = self._queue.first(self._filling(before))
        if sequence is None or sequence.drawing:
            return None  # Preempted just now: it can be computed again once its token has arrived.
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
        """A request of the version to continue with: ``last`` until its version has a multiple of ROWS_AT_ONCE
        requests, otherwise one whose version needs just one more for that."""
        counts = Counter(map(_slot, self._running))
        if last is not None and counts[last.slot] % ROWS_AT_ONCE:
            return last
        lacking = (s for s in self._running if s.slot >= 0 and (counts[s.slot] + 1) % ROWS_AT_ONCE == 0)
        return next(filter(self._queue.waits, lacking), None)
