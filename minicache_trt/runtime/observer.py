"""Who is told what happens to a request, step by step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from minicache_trt.runtime.generation import TokenEvent
    from minicache_trt.runtime.request import Sequence
    from minicache_trt.runtime.sampler import Logits


class RequestObserver(Protocol):
    """Told about one request in the engine thread, so it must not wait; what it raises ends the request."""

    def started(self, sequence: Sequence) -> None:
        """The first step of the request ran; its tokens, and how many of its prompt were found in the cache."""
        ...

    def sampled(self, position: int, logits: Logits) -> None:
        """Raw logits ``[vocab]`` from which the token at ``position`` was sampled; only valid during the call."""
        ...

    def advanced(self, event: TokenEvent) -> None:
        """A token, or the end, came; nothing comes after an event with a ``finish_reason``."""
        ...
