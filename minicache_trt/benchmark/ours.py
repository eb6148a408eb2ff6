"""Our side of a measurement."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence

from minicache_trt.benchmark.timings import Timings
from minicache_trt.errors import UserError
from minicache_trt.runtime.generation import TokenEvent
from minicache_trt.runtime.llm import LLM
from minicache_trt.runtime.request import SamplingParams


class Ours:
    """`LLM.generate`, timed by the tokens it reports; greedy, on through end-of-sequence tokens.

    Parameters
    ----------
    llm : LLM
        Without a tokenizer, so that no text is made.
    """

    name = "minicache-trt"

    def __init__(self, llm: LLM) -> None:
        self.llm = llm
        self.pid = os.getpid()

    def run(self, prompts: Sequence[list[int]], new_tokens: int) -> Timings:
        """Prefill ``prompts`` and generate ``new_tokens`` after each.

        Raises
        ------
        UserError
            No step had all sequences, or a request ended early.
        """
        events: list[tuple[str, float]] = []

        def stamp(event: TokenEvent) -> None:
            events.append((event.request_id, time.perf_counter()))

        params = SamplingParams(max_tokens=new_tokens, temperature=0.0, ignore_eos=True)
        start = time.perf_counter()
        outputs = self.llm.generate(list(prompts), params, on_token=stamp)
        completions = [output.outputs[0] for output in outputs]
        for completion in completions:
            if completion.finish_reason == "error":
                raise UserError(f"a request ended early: {completion.stop_reason}")
        tokens = tuple(tuple(completion.token_ids) for completion in completions)
        timings = Timings.from_events(start, events, len(prompts), tokens)
        if self.llm.statistics.preemptions or not timings.steps:
            raise UserError(
                f"{len(prompts)} sequences of {len(prompts[0])}+{new_tokens} tokens never decode all together",
                "raise --kv-cache-memory or --new-tokens, or build the engine with a larger --max-num-tokens",
            )
        return timings

    def cache_bytes(self) -> tuple[int, int]:
        """Cache bytes of both tiers: most in use during the latest run, and allocated."""
        statistics = self.llm.statistics
        return (
            statistics.full_bytes_used + statistics.compressed_bytes_used,
            statistics.full_bytes_allocated + statistics.compressed_bytes_allocated,
        )
