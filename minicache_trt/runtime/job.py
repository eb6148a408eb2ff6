"""What the runner asks of the things it runs, and what it tells about them."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from minicache_trt.runtime.demotion import Demotion
from minicache_trt.runtime.generation import TokenEvent
from minicache_trt.runtime.request import Sequence
from minicache_trt.runtime.scheduler import Work
from minicache_trt.runtime.step_logits import StepLogits


class Job(Protocol):
    """What a sequence does with its logits."""

    @property
    def sequence(self) -> Sequence: ...

    @property
    def finished(self) -> bool: ...

    @property
    def event(self) -> TokenEvent | None:
        """What the latest `advance` or `end` brought."""
        ...

    def advance(self, item: Work, logits: StepLogits, last: int) -> int | None:
        """Take the logits of an item that ran, ``item.num_logits`` rows before row ``last``; return its next token.

        Must return a token, or be finished, when the item reached the sequence's last known token. The logits are only
        valid during the call.
        """
        ...

    def compressed(self, demotion: Demotion) -> None:
        """A block was compressed; source and target are as the engine left them."""
        ...

    def end(self, reason: str, message: str | None = None) -> None:
        """Be finished before time."""
        ...


class Update(NamedTuple):
    """A job as one step left it; ``event`` is None when it computed a part of its prompt."""

    job: Job
    event: TokenEvent | None
    finished: bool

    @classmethod
    def of(cls, job: Job) -> Update:
        return cls(job, job.event, job.finished)
