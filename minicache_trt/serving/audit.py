"""What compression does to the traffic: served requests against an uncompressed engine."""

from __future__ import annotations

import threading
from collections import deque
from contextlib import closing
from dataclasses import dataclass

import numpy as np

from minicache_trt.runtime.request import Sequence
from minicache_trt.runtime.runner import Runner
from minicache_trt.runtime.sampler import Logits
from minicache_trt.runtime.scoring import Scoring
from minicache_trt.serving.admission import Admission
from minicache_trt.serving.metrics import Metrics
from minicache_trt.serving.recent import Recent
from minicache_trt.serving.recording import Recording

BACKLOG = 16
"""Requests that may wait for their audit."""
ROWS = 64
"""Tokens compared per request; each takes 4 bytes per entry of the vocabulary until then."""


@dataclass(frozen=True)
class Audit:
    """A finished request: its tokens, as far as they were computed, and the logits it was served with."""

    token_ids: list[int]
    prompt_len: int
    rows: dict[int, Logits]


class Comparison:
    """What another engine makes of an audit's tokens (`Rows` of a `Scoring`): each recorded row is compared as soon as
    it is there, and none is kept.

    Attributes
    ----------
    divergences : list of float
        KL(this engine || recorded) of each recorded token, in nats.
    agreements : int
        Recorded tokens whose most likely token is the same.
    """

    def __init__(self, audit: Audit) -> None:
        self.divergences: list[float] = []
        self.agreements = 0
        self._recorded, self._start = audit.rows, min(audit.rows)

    def keep(self, first: int, logits: Logits) -> None:
        """Compare the rows that were recorded: row 0 is of the first recorded token."""
        for token, row in enumerate(logits, self._start + first):
            recorded = self._recorded.get(token)
            if recorded is not None:
                self.divergences.append(divergence(row, recorded))
                self.agreements += int(row.argmax() == recorded.argmax())

    def result(self) -> Comparison:
        return self


def replay(audit: Audit) -> Scoring[Comparison]:
    """The same tokens on another engine."""
    return Scoring(audit.token_ids, audit.prompt_len, min(audit.rows) - 1, Comparison(audit))


class Auditor:
    """Replays a share of the finished requests, one at a time, in a thread of its own, while nothing is under way.

    The uncompressed engine makes one small step at a time and stops between two of them as soon as a request comes.
    The backlog is bounded: when it is full, the oldest waits no longer.

    Parameters
    ----------
    uncompressed : Runner
        Of an engine of the same checkpoint without compression, used by nobody else.
    rate : float
        Share of requests, in [0, 1]; which ones depends on their number alone.
    admission : Admission
        Tells when the server is idle.
    metrics : Metrics
    recent : Recent
    """

    def __init__(
        self, uncompressed: Runner, rate: float, admission: Admission, metrics: Metrics, recent: Recent
    ) -> None:
        if not 0 <= rate <= 1:
            raise ValueError(f"audit_rate: expected a number in [0, 1], got {rate}")
        self._uncompressed = uncompressed
        self._rate = rate
        self._admission = admission
        self._metrics = metrics
        self._recent = recent
        self._changed = threading.Condition()  # guards what follows
        self._due = 0.0
        self._backlog: deque[Audit] = deque()
        self._closed = False
        self._busy = False
        self._thread = threading.Thread(target=self._run, name="minicache-trt-audit", daemon=True)
        self._thread.start()

    def recording(self) -> Recording | None:
        """Where to record the next request, when it is one of those to be audited."""
        with self._changed:
            self._due += self._rate
            if self._due < 1:
                return None
            self._due -= 1
            return Recording(ROWS)

    def offer(self, recording: Recording, sequence: Sequence) -> None:
        """A recorded request has ended; never waits."""
        if not recording.rows:
            return
        token_ids = sequence.token_ids[: max(recording.rows)]
        with self._changed:
            if len(self._backlog) == BACKLOG:
                self._backlog.popleft()
                self._metrics.audits["dropped"].inc()
            self._backlog.append(Audit(token_ids, sequence.prompt_len, recording.rows))
            self._metrics.audit_backlog.set(len(self._backlog))
            self._changed.notify_all()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until every request offered so far has been replayed or dropped; whether that came in time."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._backlog and not self._busy, timeout)

    def close(self) -> None:
        """Stop between two steps; what waits is dropped."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()

    def _run(self) -> None:
        while (audit := self._next()) is not None:
            try:
                job = replay(audit)
                if not self._ran(job):
                    return
                self._count(job.result())
            except Exception:  # an audit that fails must not take the server's other audits with it
                self._metrics.audits["failed"].inc()

    def _next(self) -> Audit | None:
        with self._changed:
            self._busy = False
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._closed or self._backlog)
            if self._closed:
                return None
            self._busy = True
            audit = self._backlog.popleft()
            self._metrics.audit_backlog.set(len(self._backlog))
            return audit

    def _ran(self, job: Scoring[Comparison]) -> bool:
        """Whether it came to its end."""
        self._admission.wait_until_idle_or_draining()
        with closing(self._uncompressed.run([job])) as steps:
            for _ in steps:
                self._admission.wait_until_idle_or_draining()
                if self._closed or self._admission.draining:
                    return False
        return True

    def _count(self, found: Comparison) -> None:
        for value in found.divergences:
            self._metrics.kl_divergence.observe(value)
        self._recent.audited(found.divergences, found.agreements)
        self._metrics.audit_agreements.inc(found.agreements)
        self._metrics.audits["replayed"].inc()


def divergence(reference: Logits, other: Logits) -> float:
    """KL(reference || other) of two rows of logits ``[vocab]``, in nats."""
    p, q = (row.astype(np.float64) for row in (reference, other))
    p, q = (row - row.max() for row in (p, q))
    p, q = (row - np.log(np.exp(row).sum()) for row in (p, q))
    return max(0.0, float(np.exp(p) @ (p - q)))
