"""What Prometheus sees."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from minicache_trt.compression.size import baseline_bytes_per_token
from minicache_trt.config import BLOCK_SIZE
from minicache_trt.runtime.llm import LLM

PREFIX = "minicache"
LATENCY = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
TOKEN_LATENCY = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 1, 2.5)
TOKENS = (1, 8, 32, 128, 512, 2048, 8192, 32768, 131072)
KL = (1e-6, 1e-5, 1e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1, 3, 10)
OUTCOMES = ("stop", "length", "abort", "timeout", "error")


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
            made = Histogram(f"{PREFIX}_{name}", text, labels, registry=registry, buckets=buckets)
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
        finished = Counter(
            f"{PREFIX}_requests_finished",
            "Requests by the reason of their end.",
            [*labels, "reason"],
            registry=registry,
        )
        self._finished = finished
        self.finished = {reason: finished.labels(model_name, reason) for reason in OUTCOMES}
        rejected = Counter(
            f"{PREFIX}_requests_rejected", "Requests refused, by HTTP status.", [*labels, "status"], registry=registry
        )
        self._rejected, self._model_name = rejected, model_name
        audits = Counter(
            f"{PREFIX}_audit_requests",
            "Requests chosen for audit, by what became of them.",
            [*labels, "outcome"],
            registry=registry,
        )
        self.audits = {outcome: audits.labels(model_name, outcome) for outcome in ("replayed", "dropped", "failed")}
        self.audit_agreements = Counter(
            f"{PREFIX}_audit_top1_agreements",
            "Audited tokens whose most likely token is the same.",
            labels,
            registry=registry,
        ).labels(model_name)
        self.audit_backlog = Gauge(
            f"{PREFIX}_audit_backlog", "Requests that wait for their audit.", labels, registry=registry
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
        statistics, load, name = self._llm.statistics, self._llm.load, [self._model_name]
        for key, text, value in (
            ("requests_running", "Requests in the engine's batch.", load.running),
            ("requests_waiting", "Requests that wait for a place in it.", load.waiting),
        ):
            yield _gauge(key, text, [], [(name, value)])
        for key, text, value in (
            ("prompt_tokens", "Prompt tokens of submitted requests.", statistics.prompt_tokens),
            ("generation_tokens", "Tokens generated.", statistics.generated_tokens),
            ("preemptions", "Times a request gave up its blocks.", statistics.preemptions),
            ("demoted_blocks", "Blocks moved to the compressed tier.", statistics.demotions),
            ("prefix_cache_queries", "Tokens looked up in the prefix cache.", statistics.lookup_tokens),
            ("prefix_cache_hits", "Tokens found there.", statistics.hit_tokens),
            ("prefix_cache_evictions", "Reusable blocks whose space was needed.", statistics.evictions),
        ):
            family = CounterMetricFamily(f"{PREFIX}_{key}", text, labels=["model_name"])
            family.add_metric(name, value)
            yield family
        tiers = (("full", load.full), ("compressed", load.compressed))
        states = [
            ([*name, tier, state], count)
            for tier, usage in tiers
            for state, count in (
                ("used", usage.used),
                ("reusable", usage.reusable),
                ("free", usage.total - usage.used - usage.reusable),
            )
        ]
        yield _gauge("kv_cache_blocks", f"Blocks of {BLOCK_SIZE} tokens.", ["tier", "state"], states)
        shares = [([*name, tier], usage.used / usage.total if usage.total else 0.0) for tier, usage in tiers]
        yield _gauge("kv_cache_usage_ratio", "Share of a tier's blocks that requests use.", ["tier"], shares)
        sizes = self._llm.cache_sizes
        allocated = [([*name, "full"], sizes.full_bytes), ([*name, "compressed"], sizes.compressed_bytes)]
        yield _gauge("kv_cache_bytes", "Bytes allocated.", ["tier"], allocated)
        ratios = [([*name, scope], value) for scope, value in compression_ratios(self._llm).items()]
        yield _gauge("kv_cache_compression_ratio", "Bytes of the same tokens in 16 bits over bytes.", ["of"], ratios)


def compression_ratios(llm: LLM) -> dict[str, float]:
    """16-bit bytes of the tokens that fit, over the bytes allocated for them: ``allocated``, and ``compressed_tier``.

    Both tiers together can be larger than 16 bits where the backend computes in 32 and the compressed tier is small.
    """
    sizes, load = llm.cache_sizes, llm.load
    block = BLOCK_SIZE * baseline_bytes_per_token(llm.engine.model)
    ratios = {"allocated": (load.full.total + load.compressed.total) * block / sizes.num_bytes}
    if sizes.compressed_block_bytes:
        ratios["compressed_tier"] = block / sizes.compressed_block_bytes
    return ratios


def _gauge(key: str, text: str, labels: list[str], values: Iterable[tuple[list[str], float]]) -> GaugeMetricFamily:
    family = GaugeMetricFamily(f"{PREFIX}_{key}", text, labels=["model_name", *labels])
    for names, value in values:
        family.add_metric(names, value)
    return family
