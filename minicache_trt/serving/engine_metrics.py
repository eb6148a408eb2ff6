"""Numbers the engine keeps itself, as every server exports them: our own over HTTP, and Triton."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from minicache_trt.compression.size import baseline_bytes_per_token
from minicache_trt.config import BLOCK_SIZE
from minicache_trt.runtime.llm import LLM

PREFIX = "minicache_"

GAUGES = {
    "requests_running": "Requests in the engine's batch.",
    "requests_waiting": "Requests that wait for a place in it.",
    "kv_cache_blocks": f"Blocks of {BLOCK_SIZE} tokens.",
    "kv_cache_usage_ratio": "Share of a tier's blocks that requests use.",
    "kv_cache_bytes": "Bytes allocated.",
    "kv_cache_compression_ratio": "Bytes of the same tokens in 16 bits over bytes.",
    "prefix_cache_hit_rate": "Share of the tokens looked up that were found.",
}
COUNTERS = {
    "prompt_tokens": "Prompt tokens of submitted requests.",
    "generation_tokens": "Tokens generated.",
    "preemptions": "Times a request gave up its blocks.",
    "demoted_blocks": "Blocks moved to the compressed tier.",
    "prefix_cache_queries": "Tokens looked up in the prefix cache.",
    "prefix_cache_hits": "Tokens found there.",
    "prefix_cache_evictions": "Reusable blocks whose space was needed.",
}
"""By name, without the suffix ``_total`` that Prometheus shows."""

REQUESTS_FINISHED = "requests_finished"
REQUESTS_FINISHED_TEXT = "Requests by the reason of their end."
OUTCOMES = ("stop", "length", "abort", "timeout", "error")
"""Values of its label ``reason``."""


class Value(NamedTuple):
    """One value of ``GAUGES`` or ``COUNTERS``."""

    name: str
    labels: tuple[tuple[str, str], ...]
    value: float


def engine_values(llm: LLM) -> Iterator[Value]:
    """Every value of both, now; those of one name follow each other and have the same labels."""
    load, statistics, sizes = llm.load, llm.statistics, llm.cache_sizes
    yield Value("requests_running", (), load.running)
    yield Value("requests_waiting", (), load.waiting)
    tiers = (("full", load.full, sizes.full_bytes), ("compressed", load.compressed, sizes.compressed_bytes))
    for tier, usage, _ in tiers:
        free = usage.total - usage.used - usage.reusable
        for state, count in (("used", usage.used), ("reusable", usage.reusable), ("free", free)):
            yield Value("kv_cache_blocks", (("tier", tier), ("state", state)), count)
    for tier, usage, _ in tiers:
        yield Value("kv_cache_usage_ratio", (("tier", tier),), usage.used / usage.total if usage.total else 0.0)
    for tier, _, num_bytes in tiers:
        yield Value("kv_cache_bytes", (("tier", tier),), num_bytes)
    for scope, ratio in compression_ratios(llm).items():
        yield Value("kv_cache_compression_ratio", (("of", scope),), ratio)
    yield Value("prefix_cache_hit_rate", (), statistics.hit_rate)
    yield Value("prompt_tokens", (), statistics.prompt_tokens)
    yield Value("generation_tokens", (), statistics.generated_tokens)
    yield Value("preemptions", (), statistics.preemptions)
    yield Value("demoted_blocks", (), statistics.demotions)
    yield Value("prefix_cache_queries", (), statistics.lookup_tokens)
    yield Value("prefix_cache_hits", (), statistics.hit_tokens)
    yield Value("prefix_cache_evictions", (), statistics.evictions)


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
