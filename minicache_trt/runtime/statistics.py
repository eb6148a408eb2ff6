"""What a run cost."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Statistics:
    """Counts and times of one call of `LLM.generate`, `LLM.generate_stream` or `LLM.score`.

    Parameters
    ----------
    prompt_tokens, generated_tokens : int
        Tokens submitted and tokens sampled (or fed, when scoring).
    prefill_steps, prefill_tokens, prefill_seconds
        Steps with at least one chunk of several tokens, or of a prompt, and all tokens they computed.
    decode_steps, decode_tokens, decode_seconds
        The other steps: one generated token per sequence.
    demotions : int
        Blocks compressed.
    preemptions : int
        Times a sequence gave up its blocks.
    lookup_tokens, hit_tokens : int
        Tokens of the sequences that were admitted (again after each preemption), and how many of these were found in
        the cache.
    evictions : int
        Reusable blocks of both tiers whose space was needed.
    full_bytes_used, compressed_bytes_used : int
        Most bytes of each tier in use at the end of a step.
    full_bytes_allocated, compressed_bytes_allocated : int
        Bytes of the pools.
    """

    full_bytes_allocated: int
    compressed_bytes_allocated: int
    prompt_tokens: int = 0
    generated_tokens: int = 0
    prefill_steps: int = 0
    prefill_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_steps: int = 0
    decode_tokens: int = 0
    decode_seconds: float = 0.0
    demotions: int = 0
    preemptions: int = 0
    lookup_tokens: int = 0
    hit_tokens: int = 0
    evictions: int = 0
    full_bytes_used: int = 0
    compressed_bytes_used: int = 0

    @property
    def prefill_tokens_per_second(self) -> float:
        return self.prefill_tokens / self.prefill_seconds if self.prefill_seconds else 0.0

    @property
    def decode_tokens_per_second(self) -> float:
        return self.decode_tokens / self.decode_seconds if self.decode_seconds else 0.0

    @property
    def hit_rate(self) -> float:
        """Share of the tokens looked up that were found, in [0, 1]."""
        return self.hit_tokens / self.lookup_tokens if self.lookup_tokens else 0.0
