"""Which replica a request goes to: the one that has seen its beginning."""

from __future__ import annotations

from typing import Any

from ray.serve.request_router import RequestRouter

from minicache_trt.serving.prefix_key import preferred


class PrefixRouter(RequestRouter):
    """Sends equal beginnings to the same replica, unless that one has far more to do than another.

    The key is the keyword argument ``key`` of the call. Loads are the queue lengths Ray Serve keeps anyway.
    """

    def initialize_state(self, **kwargs: Any) -> None:
        """``imbalance``: requests the preferred replica may have beyond the least loaded one."""
        self._imbalance = int(kwargs["imbalance"])

    async def choose_replicas(self, candidate_replicas: list[Any], pending_request: Any = None) -> list[list[Any]]:
        """The preferred replica, then all, of which Ray Serve takes the least loaded that has a place."""
        if pending_request is not None:
            pending_request.routing_context.should_backoff = True
        key = pending_request.kwargs.get("key") if pending_request is not None else None
        replicas = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        if not key or not replicas:
            return [candidate_replicas]
        first = replicas[preferred(key, replicas)]
        loads = {name: self.replica_queue_len_cache.get(replica.replica_id) for name, replica in replicas.items()}
        known = [load for load in loads.values() if load is not None]
        own = loads[first.replica_id.unique_id]
        if own is not None and own - min(known) > self._imbalance:
            return [candidate_replicas]
        return [[first], candidate_replicas]
