"""Placement inside Ray Serve: chooses the replica for each call of a handle.

The version's digest travels as ``multiplexed_model_id``; replicas report through ``record_routing_stats``
(:func:`routing_stats`). A request always goes to the replica that was chosen for it. Serve's default implementation may
give that replica to another pending request, and hangs when one HTTP request makes two calls at once.
"""

import time
from collections import Counter, OrderedDict
from collections.abc import Iterable
from typing import Any

from ray.serve.request_router import LocalityMixin, PendingRequest, ReplicaID, RequestRouter, RunningReplica

from deltazip_deployments.placement import Costs, ReplicaView, choose, spill_target

PREFETCH = "prefetch"
"""The replica's prefetch method. Its calls go to the replica that a version would spill to, not to where it is."""
_TRUST_OWN_ASSIGNMENT_S = 10.0
_SUSPECT_S = 3.0


def routing_stats(
    *, device: Iterable[str], loading: Iterable[str], host: Iterable[str], slots: int, capacity: int, stopped: bool
) -> dict[str, Any]:
    """A replica's report to all routers. Only values that change rarely, as each change is broadcast."""
    return {
        "device": sorted(device),
        "loading": sorted(loading),
        "host": sorted(host),
        "slots": slots,
        "capacity": capacity,
        "stopped": stopped,
    }


class _Assignments:
    """The recent assignments of this router, as replicas' reports are late by up to their period."""

    def __init__(self) -> None:
        self._recent: OrderedDict[tuple[ReplicaID, str], float] = OrderedDict()

    def add(self, replica: ReplicaID, version: str) -> None:
        self._recent[replica, version] = time.monotonic()
        self._recent.move_to_end((replica, version))

    def of(self, replica: ReplicaID) -> frozenset[str]:
        oldest = time.monotonic() - _TRUST_OWN_ASSIGNMENT_S
        while self._recent and next(iter(self._recent.values())) < oldest:
            self._recent.popitem(last=False)
        return frozenset(version for owner, version in self._recent if owner == replica)


class DeltaAwareRouter(LocalityMixin, RequestRouter):
    """Sends each request where its first token should come soonest."""

    def initialize_state(self, **kwargs: float) -> None:
        """Take :class:`Costs` from ``request_router_kwargs``."""
        self._costs = Costs(**kwargs)
        self._assignments = _Assignments()
        self._ongoing: Counter[ReplicaID] = Counter()
        self._routed: Counter[tuple[str, ReplicaID]] = Counter()
        self._probes = set[Any]()
        self._suspects: dict[ReplicaID, float] = {}

    async def _choose_replica_for_request(
        self, pending_request: PendingRequest, *, is_retry: bool = False
    ) -> RunningReplica:
        """The best replica that can take the request; waits until there is one."""
        attempt = 0
        if is_retry:
            # The replica rejected the request or is gone: wait until its state has reached this router.
            await self._backoff(attempt)
        while not (ranked := await self.choose_replicas(self._open_replicas(), pending_request)):
            if self._replicas:
                await self._backoff(attempt)
                attempt += 1
            else:
                self._replicas_updated_event.clear()
                await self._replicas_updated_event.wait()
        replica = ranked[0][0]
        version = pending_request.metadata.multiplexed_model_id
        if version:
            self._assignments.add(replica.replica_id, version)
        return replica

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """A single rank with the cheapest candidate; no rank without candidates."""
        if not candidate_replicas:
            return []
        version = pending_request.metadata.multiplexed_model_id or None if pending_request else None
        views = {replica.replica_id: self._view(replica) for replica in candidate_replicas}
        best = None
        if version is not None and pending_request is not None and pending_request.metadata.call_method == PREFETCH:
            best = spill_target(views, version, self._costs)
        if best is None:
            best = choose(views, version, self._costs)
        return [[replica for replica in candidate_replicas if replica.replica_id == best]]

    def _open_replicas(self) -> list[RunningReplica]:
        """Replicas with room; those that did not answer, or whose engine has ended, only if there are no others."""
        with_room = self.select_available_replicas()
        return [replica for replica in with_room if self._is_trusted(replica)] or with_room

    def _is_trusted(self, replica: RunningReplica) -> bool:
        """An engine that has ended answers fastest of all, with an error, until Serve replaces its replica."""
        stopped = (replica.routing_stats or {}).get("stopped", False)
        return not stopped and self._suspects.get(replica.replica_id, 0.0) < time.monotonic()

    def _view(self, replica: RunningReplica) -> ReplicaView:
        stats = replica.routing_stats or {}
        device = frozenset(stats.get("device", ()))
        known = self.replica_queue_len_cache.get(replica.replica_id) or 0
        return ReplicaView(
            device=device,
            loading=(frozenset(stats.get("loading", ())) | self._assignments.of(replica.replica_id)) - device,
            host=frozenset(stats.get("host", ())),
            slots=stats.get("slots", 1),
            ongoing=max(known, self._ongoing[replica.replica_id]),
            capacity=stats.get("capacity", 1),
        )

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
        """Count the request as ongoing there."""
        super().on_request_routed(pending_request, replica_id, result)
        if not pending_request.metadata.is_streaming:
            # Serve may report the end of a short call before its beginning. Such calls join no batch anyway.
            return
        self._ongoing[replica_id] += 1
        self._routed[pending_request.metadata.internal_request_id, replica_id] += 1

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        """Stop counting it."""
        super().on_request_completed(replica_id, internal_request_id)
        call = (internal_request_id, replica_id)
        if self._routed[call] > 0:
            self._ongoing[replica_id] -= 1
            self._routed[call] -= 1
        if not self._routed[call]:
            del self._routed[call]

    def on_replica_actor_unavailable(self, replica_id: ReplicaID) -> None:
        """Avoid the replica until it answers a probe or is known to be dead."""
        super().on_replica_actor_unavailable(replica_id)
        self._suspects[replica_id] = time.monotonic() + _SUSPECT_S
        replica = self._replicas.get(replica_id)
        if replica is not None:
            probe = self._event_loop.create_task(self._probe_queue_lens([replica], 0))
            self._probes.add(probe)
            probe.add_done_callback(self._probes.discard)

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Forget replicas that are gone."""
        super().update_replicas(replicas)
        alive = {replica.replica_id for replica in replicas}
        self._suspects = {key: until for key, until in self._suspects.items() if key in alive}
        self._ongoing = Counter({key: count for key, count in self._ongoing.items() if key in alive})
