"""What Triton's metrics endpoint shows of an instance; names as of our own server."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from minicache_trt.compression.size import baseline_bytes_per_token
from minicache_trt.config import BLOCK_SIZE
from minicache_trt.runtime.llm import LLM

PREFIX = "minicache_"
Labels = tuple[tuple[str, str], ...]

GAUGES = {
    "requests_running": "Requests in the engine's batch.",
    "requests_waiting": "Requests that wait for a place in it.",
    "kv_cache_blocks": f"Blocks of {BLOCK_SIZE} tokens.",
    "kv_cache_usage_ratio": "Share of a tier's blocks that requests use.",
    "kv_cache_bytes": "Bytes allocated.",
    "kv_cache_compression_ratio": "16-bit bytes of as many tokens as all blocks hold, over the bytes allocated.",
    "prefix_cache_hit_rate": "Share of the tokens looked up that were found.",
}
COUNTERS = {
    "prompt_tokens_total": "Prompt tokens of submitted requests.",
    "generation_tokens_total": "Tokens generated.",
    "preemptions_total": "Times a request gave up its blocks.",
    "demoted_blocks_total": "Blocks moved to the compressed tier.",
    "prefix_cache_queries_total": "Tokens looked up in the prefix cache.",
    "prefix_cache_hits_total": "Tokens found there.",
    "prefix_cache_evictions_total": "Reusable blocks whose space was needed.",
    "requests_finished_total": "Requests by the reason of their end.",
}


class InstanceMetrics:
    """Families of the model and this instance's values, brought up to date by `update`.

    Parameters
    ----------
    pb_utils : module
        Triton's ``triton_python_backend_utils``.
    llm : LLM
        What is measured.
    model, version, instance : str
        Labels of every value.
    """

    def __init__(self, pb_utils: Any, llm: LLM, model: str, version: str, instance: str) -> None:
        self._llm = llm
        self._labels = {"model": model, "version": version, "instance": instance}
        family = pb_utils.MetricFamily
        kinds = [(GAUGES, family.GAUGE), (COUNTERS, family.COUNTER)]
        self._families = {
            name: family(name=PREFIX + name, description=text, kind=kind)
            for texts, kind in kinds
            for name, text in texts.items()
        }
        self._metrics: dict[tuple[str, Labels], Any] = {}
        self._shown: dict[tuple[str, Labels], float] = {}
        self._finished = {"stop": 0, "length": 0, "abort": 0, "timeout": 0, "error": 0, "rejected": 0}
        self.update()

    def finished(self, reason: str) -> None:
        """A sequence has ended, or was ``rejected``."""
        self._finished[reason] += 1

    def update(self) -> None:
        """Tell Triton what has changed; each change is a message to another process."""
        for name, labels, value in self._values():
            key = name, labels
            metric = self._metrics.get(key)
            if metric is None:
                metric = self._metrics[key] = self._families[name].Metric(labels=self._labels | dict(labels))
                self._shown[key] = 0.0
            if value == self._shown[key]:
                continue
            if name in COUNTERS:
                metric.increment(value - self._shown[key])
            else:
                metric.set(value)
            self._shown[key] = value

    def _values(self) -> Iterator[tuple[str, Labels, float]]:
        llm, load = self._llm, self._llm.load
        statistics, sizes = llm.statistics, llm.cache_sizes
        yield "requests_running", (), load.running
        yield "requests_waiting", (), load.waiting
        for tier, usage, num_bytes in (
            ("full", load.full, sizes.full_bytes),
            ("compressed", load.compressed, sizes.compressed_bytes),
        ):
            label = ("tier", tier)
            free = usage.total - usage.used - usage.reusable
            for state, count in (("used", usage.used), ("reusable", usage.reusable), ("free", free)):
                yield "kv_cache_blocks", (label, ("state", state)), count
            yield "kv_cache_usage_ratio", (label,), usage.used / usage.total if usage.total else 0.0
            yield "kv_cache_bytes", (label,), num_bytes
        tokens = (load.full.total + load.compressed.total) * BLOCK_SIZE
        yield "kv_cache_compression_ratio", (), tokens * baseline_bytes_per_token(llm.engine.model) / sizes.num_bytes
        yield "prefix_cache_hit_rate", (), statistics.hit_rate
        yield "prompt_tokens_total", (), statistics.prompt_tokens
        yield "generation_tokens_total", (), statistics.generated_tokens
        yield "preemptions_total", (), statistics.preemptions
        yield "demoted_blocks_total", (), statistics.demotions
        yield "prefix_cache_queries_total", (), statistics.lookup_tokens
        yield "prefix_cache_hits_total", (), statistics.hit_tokens
        yield "prefix_cache_evictions_total", (), statistics.evictions
        for reason, count in self._finished.items():
            yield "requests_finished_total", (("reason", reason),), count
