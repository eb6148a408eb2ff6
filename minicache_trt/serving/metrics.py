"""What Prometheus sees."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from minicache_trt.runtime.llm import LLM
from minicache_trt.serving.engine_metrics import (
    COUNTERS,
    GAUGES,
    OUTCOMES,
    PREFIX,
    REQUESTS_FINISHED,
    REQUESTS_FINISHED_TEXT,
    engine_values,
)

LATENCY = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
TOKEN_LATENCY = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 1, 2.5)
TOKENS = (1, 8, 32, 128, 512, 2048, 8192, 32768, 131072)
KL = (1e-6, 1e-5, 1e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1, 3, 10)


class Metrics:
    """All metrics of one server, in a registry of their own.

    Parameters
    ----------
    llm : LLM
        Its counts are read whenever the metrics are.
    model_name : str
        Label of every metric.
    """

    def __init__(self, llm: LLM, model_name: str) -> None:
        self.registry = CollectorRegistry()
        labels, registry = ["model_name"], self.registry

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            made = Histogram(f"{PREFIX}{name}", text, labels, registry=registry, buckets=buckets)
            return made.labels(model_name)

        self.time_to_first_token = histogram(
            "time_to_first_token_seconds", "From arrival of a request to its first token.", LATENCY
        )
        self.inter_token_latency = histogram(
            "inter_token_latency_seconds", "Between two tokens of a request.", TOKEN_LATENCY
        )
        self.request_latency = histogram(
            "e2e_request_latency_seconds", "From arrival of a request to its end.", LATENCY
        )
        self.queue_time = histogram(
            "request_queue_time_seconds", "From arrival of a request to its first step.", LATENCY
        )
        self.prompt_length = histogram("request_prompt_tokens", "Prompt tokens of finished requests.", TOKENS)
        self.output_length = histogram("request_generation_tokens", "Generated tokens of finished requests.", TOKENS)
        self.kl_divergence = histogram("audit_kl_divergence_nats", "KL(uncompressed || served) of audited tokens.", KL)
        finished = Counter(PREFIX + REQUESTS_FINISHED, REQUESTS_FINISHED_TEXT, [*labels, "reason"], registry=registry)
        self._finished = finished
        self.finished = {reason: finished.labels(model_name, reason) for reason in OUTCOMES}
        rejected = Counter(
            f"{PREFIX}requests_rejected", "Requests refused, by HTTP status.", [*labels, "status"], registry=registry
        )
        self._rejected, self._model_name = rejected, model_name
        audits = Counter(
            f"{PREFIX}audit_requests",
            "Requests chosen for audit, by what became of them.",
            [*labels, "outcome"],
            registry=registry,
        )
        self.audits = {outcome: audits.labels(model_name, outcome) for outcome in ("replayed", "dropped", "failed")}
        self.audit_agreements = Counter(
            f"{PREFIX}audit_top1_agreements",
            "Audited tokens whose most likely token is the same.",
            labels,
            registry=registry,
        ).labels(model_name)
        self.audit_backlog = Gauge(
            f"{PREFIX}audit_backlog", "Requests that wait for their audit.", labels, registry=registry
        ).labels(model_name)
        registry.register(EngineCollector(llm, model_name))

    def rejected(self, status: int) -> None:
        """A request was refused."""
        self._rejected.labels(self._model_name, str(status)).inc()

    def outcomes(self) -> dict[str, float]:
        """Requests by the reason of their end."""
        samples = [sample for metric in self._finished.collect() for sample in metric.samples]
        return {sample.labels["reason"]: sample.value for sample in samples if sample.name.endswith("_total")}

    def text(self) -> bytes:
        """Prometheus' text format."""
        return generate_latest(self.registry)


class EngineCollector(Collector):
    """Counts the engine keeps itself, read when they are asked for."""

    def __init__(self, llm: LLM, model_name: str) -> None:
        self._llm = llm
        self._model_name = model_name

    def collect(self) -> Iterable[Metric]:
        """One family per number, with all its labels."""
        for name, values in groupby(engine_values(self._llm), lambda value: value.name):
            group = list(values)
            labels = ["model_name", *(label for label, _ in group[0].labels)]
            family: GaugeMetricFamily | CounterMetricFamily
            if name in COUNTERS:
                family = CounterMetricFamily(PREFIX + name, COUNTERS[name], labels=labels)
            else:
                family = GaugeMetricFamily(PREFIX + name, GAUGES[name], labels=labels)
            for value in group:
                family.add_metric([self._model_name, *(label for _, label in value.labels)], value.value)
            yield family
