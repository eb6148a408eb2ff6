"""One request's times and counts, taken in the engine thread."""

from __future__ import annotations

import time

from minicache_trt.runtime.generation import TokenEvent
from minicache_trt.runtime.request import Sequence
from minicache_trt.runtime.sampler import Logits
from minicache_trt.serving.admission import Admission
from minicache_trt.serving.audit import Auditor
from minicache_trt.serving.metrics import Metrics
from minicache_trt.serving.recent import Recent
from minicache_trt.serving.recording import Recording


class ObservedRequest:
    """A `RequestObserver` that fills the metrics, gives up the request's place and hands it to the audit.

    Parameters
    ----------
    arrival : float
        Time of `time.perf_counter`.
    metrics : Metrics
    recent : Recent
    admission : Admission
        One place of it belongs to this request.
    auditor : Auditor, optional
    recording : Recording, optional
        When the request is to be audited.
    """

    def __init__(
        self,
        arrival: float,
        metrics: Metrics,
        recent: Recent,
        admission: Admission,
        auditor: Auditor | None,
        recording: Recording | None,
    ) -> None:
        self._arrival = arrival
        self._metrics = metrics
        self._recent = recent
        self._admission = admission
        self._auditor = auditor
        self._recording = recording
        self._sequence: Sequence | None = None
        self._num_tokens = 0
        self._latest = arrival

    def started(self, sequence: Sequence) -> None:
        """The request has left the queue."""
        self._sequence = sequence
        if sequence.first_step is not None:
            self._metrics.queue_time.observe(max(0.0, sequence.first_step - self._arrival))

    def sampled(self, position: int, logits: Logits) -> None:
        """Keep the logits for the audit."""
        if self._recording is not None:
            self._recording.add(position, logits)

    def advanced(self, event: TokenEvent) -> None:
        """Measure; at the end, make room for others."""
        now = time.perf_counter()
        if event.token_id is not None:
            if self._num_tokens == 0:
                self._metrics.time_to_first_token.observe(now - self._arrival)
                self._recent.first_token(now - self._arrival)
            else:
                self._metrics.inter_token_latency.observe(now - self._latest)
            self._num_tokens += 1
            self._latest = now
        if event.finish_reason is not None:
            self._finish(event.finish_reason, now)

    def _finish(self, reason: str, now: float) -> None:
        self._metrics.finished[reason].inc()
        self._metrics.request_latency.observe(now - self._arrival)
        if self._sequence is not None:
            self._metrics.prompt_length.observe(self._sequence.prompt_len)
            self._metrics.output_length.observe(self._num_tokens)
            if self._auditor is not None and self._recording is not None:
                self._auditor.offer(self._recording, self._sequence)
        self._admission.release()
