"""The last minutes of a server, for the status page."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import asdict, dataclass
from typing import Any

from minicache_trt.serving.engine_metrics import compression_ratios
from minicache_trt.serving.service import Service

SAMPLES = 300
RATE_SAMPLES = 5
"""Rates are averages over so many samples."""


@dataclass(frozen=True)
class Sample:
    """The server at one moment; what has no value yet is None."""

    time: float
    running: int
    waiting: int
    prompt_tokens_per_second: float
    generation_tokens_per_second: float
    ttft_p50: float | None
    ttft_p95: float | None
    full_usage: float
    compressed_usage: float
    hit_rate: float
    kl: float | None
    top1_agreement: float | None


class History:
    """The latest samples; whoever owns it calls `sample` once in a while, from one thread.

    Parameters
    ----------
    service : Service
    """

    def __init__(self, service: Service) -> None:
        self._service = service
        self._samples: deque[Sample] = deque(maxlen=SAMPLES)
        self._counts = deque([(time.perf_counter(), 0, 0)], maxlen=RATE_SAMPLES)

    def sample(self) -> None:
        """Add the present."""
        service = self._service
        load, statistics = service.llm.load, service.llm.statistics
        now, prompt, generated = time.perf_counter(), statistics.prefill_tokens, statistics.generated_tokens
        before, seconds = self._counts[0], max(now - self._counts[0][0], 1e-9)
        audit = service.recent.audit()
        self._samples.append(
            Sample(
                time=time.time(),
                running=load.running,
                waiting=load.waiting,
                prompt_tokens_per_second=max(0, prompt - before[1]) / seconds,
                generation_tokens_per_second=max(0, generated - before[2]) / seconds,
                ttft_p50=service.recent.percentile(0.5),
                ttft_p95=service.recent.percentile(0.95),
                full_usage=load.full.used / max(1, load.full.total),
                compressed_usage=load.compressed.used / max(1, load.compressed.total),
                hit_rate=statistics.hit_rate,
                kl=None if audit is None else audit[0],
                top1_agreement=None if audit is None else audit[1],
            )
        )
        self._counts.append((now, prompt, generated))

    def report(self) -> dict[str, Any]:
        """What the status page shows."""
        service = self._service
        engine, load, statistics = service.llm.engine, service.llm.load, service.llm.statistics
        return {
            "model": service.model_names[0],
            "state": "failed" if service.failed else "draining" if service.admission.draining else "ready",
            "engine": {
                "method": engine.plan.method,
                "backend": engine.build.backend,
                "weights": engine.build.weights,
                "layers": engine.model.num_layers,
                "max_batch_size": engine.build.max_batch_size,
                "max_seq_len": engine.build.max_seq_len,
            },
            "requests": {
                "in_flight": service.admission.in_flight,
                "capacity": service.admission.capacity,
                **{reason: int(count) for reason, count in service.metrics.outcomes().items()},
            },
            "tokens": {"prompt": statistics.prompt_tokens, "generated": statistics.generated_tokens},
            "cache": {
                "bytes": service.llm.cache_sizes.num_bytes,
                "compression_ratio": compression_ratios(service.llm).get("compressed_tier"),
                "full": asdict(load.full),
                "compressed": asdict(load.compressed),
                "demoted": statistics.demotions,
                "preemptions": statistics.preemptions,
            },
            "auditing": service.auditor is not None,
            "samples": [asdict(sample) for sample in self._samples],
        }
