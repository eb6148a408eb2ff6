"""Requests on an engine: admitted, measured, audited. Knows no HTTP."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from minicache_trt.errors import UserError
from minicache_trt.runtime.async_request import AsyncRequest
from minicache_trt.runtime.engine_loop import EngineClosed
from minicache_trt.runtime.llm import LLM
from minicache_trt.runtime.prompts import PromptLike
from minicache_trt.runtime.runner import Runner
from minicache_trt.runtime.sampling_params import SamplingParams
from minicache_trt.serving.admission import Admission
from minicache_trt.serving.audit import Auditor
from minicache_trt.serving.errors import ApiError
from minicache_trt.serving.metrics import Metrics
from minicache_trt.serving.observed_request import ObservedRequest
from minicache_trt.serving.parameters import of_choice
from minicache_trt.serving.recent import Recent


@dataclass(frozen=True)
class Prompts:
    """What one call asks for: ``n`` completions of each prompt, with the same parameters."""

    prompts: Sequence[PromptLike]
    params: SamplingParams
    n: int = 1
    priority: int = 0
    cache_salt: str | None = None

    @property
    def num_sequences(self) -> int:
        return len(self.prompts) * self.n


class Service:
    """Runs requests on an LLM.

    Parameters
    ----------
    llm : LLM
        Used by nobody else.
    model_names : tuple of str
        Names the model answers to; the first is its own.
    max_queue_size : int
        Sequences that may wait beside those that run.
    audit_rate : float
        Share of requests that are compared with an uncompressed engine, in [0, 1].
    uncompressed : Runner, optional
        Of that engine; needed when ``audit_rate`` is not 0.
    """

    def __init__(
        self,
        llm: LLM,
        model_names: tuple[str, ...],
        max_queue_size: int,
        audit_rate: float = 0.0,
        uncompressed: Runner | None = None,
    ) -> None:
        self.llm = llm
        self.model_names = model_names
        self.metrics = Metrics(llm, model_names[0])
        self.admission = Admission(llm.engine.build.max_batch_size, max_queue_size)
        self.recent = Recent()
        self._closed = False  # found shut down by somebody else
        self.auditor = None
        if uncompressed is not None:
            self.auditor = Auditor(uncompressed, audit_rate, self.admission, self.metrics, self.recent)

    @property
    def failed(self) -> bool:
        """Whether the engine has ended by itself and takes nothing any more."""
        return self._closed or self.llm.failure is not None

    def admit(self, num_sequences: int) -> None:
        """Take places for all sequences of a call; `submit` gives them up as they end.

        Raises
        ------
        ApiError
            See `Admission.acquire`.
        """
        try:
            self.admission.acquire(num_sequences)
        except ApiError as error:
            self.metrics.rejected(error.status)
            raise

    def submit(self, wanted: Prompts, arrival: float | None = None) -> list[AsyncRequest]:
        """Start all sequences of an admitted call: prompt by prompt, each prompt's completions in order.

        Tokenizing and compiling take a while; an event loop should let another thread do this.

        Parameters
        ----------
        wanted : Prompts
        arrival : float, optional
            Time of `time.perf_counter` from which latencies count.

        Raises
        ------
        ApiError
            When a prompt or parameter cannot be used; nothing runs then.
        """
        arrival = time.perf_counter() if arrival is None else arrival
        requests: list[AsyncRequest] = []
        try:
            for prompt in wanted.prompts:
                for index in range(wanted.n):
                    requests.append(self._start(prompt, of_choice(wanted.params, index), wanted, arrival))
        except BaseException as error:
            self.admission.release(wanted.num_sequences - len(requests))
            for request in requests:
                request.abort()
            if isinstance(error, EngineClosed):
                self._closed = not self.admission.draining
                raise ApiError(503, str(error), "service_unavailable", "engine_closed") from error
            if isinstance(error, UserError):
                raise ApiError.of(error) from error
            raise
        return requests

    def close(self, timeout: float | None) -> bool:
        """Take nothing more, let what runs end, at most ``timeout`` seconds; whether it did."""
        self.admission.drain()
        drained = self.llm.shutdown(timeout=timeout)
        if self.auditor is not None:
            self.auditor.close()
        return drained

    def _start(self, prompt: PromptLike, params: SamplingParams, wanted: Prompts, arrival: float) -> AsyncRequest:
        recording = None if self.auditor is None else self.auditor.recording()
        observer = ObservedRequest(arrival, self.metrics, self.recent, self.admission, self.auditor, recording)
        return self.llm.generate_async(
            prompt, params, priority=wanted.priority, cache_salt=wanted.cache_salt, observer=observer
        )
