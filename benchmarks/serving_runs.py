"""Requests run many at a time or one by one, and where their time goes."""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import gc
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from common import open_engine

from minicache_trt.config import KvCacheConfig
from minicache_trt.engine_directory import CHECKPOINT
from minicache_trt.load.lengths import LogNormal
from minicache_trt.runtime.batch import Batch
from minicache_trt.runtime.llm import LLM
from minicache_trt.runtime.sampling_params import SamplingParams

DECODE, PROMPTS, COMPRESS = "decode", "prompts", "compress"


class EngineTime:
    """Seconds inside an engine; its ``decode`` and ``compress`` are replaced by ones that count.

    Steps with a part of a prompt count as `PROMPTS`, with everything they compute, the others as `DECODE`.

    Attributes
    ----------
    by_kind : dict
        Seconds by kind of call.
    cpu_seconds : float
        Of the calling thread, in all calls.
    by_size : dict
        Seconds of each call of kind `DECODE`, by its number of sequences.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self.by_kind: dict[str, float] = collections.defaultdict(float)
        self.by_size: dict[int, list[float]] = collections.defaultdict(list)
        self.cpu_seconds = 0.0

    @property
    def seconds(self) -> float:
        return sum(self.by_kind.values())

    def watch(self, engine: Any) -> None:
        engine.decode = self._timed(engine.decode, lambda batch: DECODE if _only_decodes(batch) else PROMPTS)
        engine.compress = self._timed(engine.compress, lambda *_: COMPRESS)

    def _timed(self, call: Callable[..., Any], kind_of: Callable[..., str]) -> Callable[..., Any]:
        def timed(*arguments: Any) -> Any:
            kind, start, cpu = kind_of(*arguments), time.perf_counter(), time.thread_time()
            try:
                return call(*arguments)
            finally:
                self.cpu_seconds += time.thread_time() - cpu
                seconds = time.perf_counter() - start
                self.by_kind[kind] += seconds
                if kind == DECODE:
                    self.by_size[arguments[0].num_tokens].append(seconds)

        return timed


def _only_decodes(batch: Batch) -> bool:
    return len(batch.decode_rows) == len(batch.context_len)


@dataclasses.dataclass(frozen=True)
class Work:
    """Prompts and the number of tokens wanted after each."""

    prompts: list[list[int]]
    output_lens: list[int]

    @classmethod
    def mixed(cls, count: int, vocab_size: int, mean: int, most: int) -> Work:
        """Log-normal lengths of prompts and answers, of random tokens."""
        rng = np.random.default_rng(0)
        inputs = LogNormal(mean, 0.8, most).draw(rng, count)
        outputs = LogNormal(mean, 0.8, most).draw(rng, count)
        # Ids from 3 on: the first ones are special in the checkpoints at hand.
        return cls([rng.integers(3, vocab_size, length).tolist() for length in inputs], outputs)

    @classmethod
    def growing(cls, count: int, vocab_size: int, most: int) -> Work:
        """Short prompts and long answers: all that are admitted together outgrow the cache together."""
        rng = np.random.default_rng(1)
        inputs = rng.integers(16, 96, count)
        outputs: list[int] = rng.integers(most // 2, most, count, endpoint=True).tolist()
        return cls([rng.integers(3, vocab_size, length).tolist() for length in inputs], outputs)

    def params(self, index: int) -> SamplingParams:
        return SamplingParams(max_tokens=self.output_lens[index], temperature=0, ignore_eos=True)


@dataclasses.dataclass(frozen=True)
class Span:
    """From the start of a run on: seconds, those inside the engine, and tokens generated."""

    seconds: float
    engine_seconds: float
    tokens: int

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds

    @property
    def runtime_share(self) -> float:
        """Of the time, outside the engine."""
        return 1 - self.engine_seconds / self.seconds


@dataclasses.dataclass(frozen=True)
class Run:
    """One pass over the work.

    Parameters
    ----------
    whole : Span
    busy : Span
        While all streams ran: up to the first end of a request that no other took the place of.
    cpu_seconds, engine_cpu_seconds : float
        Of the process, and of the thread that calls the engine while it does.
    by_kind : dict
        Seconds inside the engine.
    full_step : float, optional
        Median seconds of the engine's steps that decoded one token of every stream.
    """

    whole: Span
    busy: Span
    cpu_seconds: float
    engine_cpu_seconds: float
    by_kind: dict[str, float]
    full_step: float | None
    outputs: list[list[int]]
    first_tokens: list[float]

    @property
    def runtime_cpu_share(self) -> float:
        """Of the process' CPU time, outside the engine; for engines that compute in the thread that calls them."""
        return 1 - self.engine_cpu_seconds / self.cpu_seconds

    def per_token(self) -> dict[str, float]:
        """Seconds per generated token, by what they went into."""
        seconds = self.by_kind | {"runtime": self.whole.seconds - self.whole.engine_seconds}
        return {name: value / self.whole.tokens for name, value in seconds.items()}

    def figures(self) -> dict[str, Any]:
        spans = {name: dataclasses.asdict(span) for name, span in (("whole", self.whole), ("busy", self.busy))}
        return {
            **spans,
            "tokens_per_second": self.whole.tokens_per_second,
            "runtime_share": self.whole.runtime_share,
            "cpu_seconds": self.cpu_seconds,
            "engine_cpu_seconds": self.engine_cpu_seconds,
            "seconds_per_token": self.per_token(),
            "full_step_seconds": self.full_step,
            "median_time_to_first_token": statistics.median(self.first_tokens),
        }


def run_work(llm: LLM, spent: EngineTime, work: Work, streams: int) -> Run:
    """All requests in order, ``streams`` at a time."""
    total, begun, tokens_seen = len(work.prompts), 0, 0
    busy: Span | None = None

    def span() -> Span:
        return Span(time.perf_counter() - start, spent.seconds, tokens_seen)

    async def one(index: int, places: asyncio.Semaphore) -> tuple[list[int], float]:
        nonlocal begun, busy
        async with places:
            begun += 1
            result = await generate(index)
            if begun == total and busy is None:
                busy = span()
            return result

    async def generate(index: int) -> tuple[list[int], float]:
        nonlocal tokens_seen
        begin, first, tokens, reason = time.perf_counter(), None, [], None
        async for update in llm.generate_async(work.prompts[index], work.params(index)):
            first = first or time.perf_counter() - begin
            tokens += update.outputs[0].token_ids_diff
            tokens_seen += len(update.outputs[0].token_ids_diff)
            reason = update.outputs[0].finish_reason
        if reason != "length" or len(tokens) != work.output_lens[index]:
            raise RuntimeError(f"request {index} ended with {reason} after {len(tokens)} of {work.output_lens[index]}")
        return tokens, first or 0.0

    async def everything() -> list[tuple[list[int], float]]:
        places = asyncio.Semaphore(streams)
        return await asyncio.gather(*(one(index, places) for index in range(total)))

    spent.clear()
    start, cpu = time.perf_counter(), time.process_time()
    results = asyncio.run(everything())
    whole = span()
    cpu = time.process_time() - cpu
    steps = spent.by_size.get(streams)
    full_step = statistics.median(steps) if steps else None
    outputs, first_tokens = map(list, zip(*results, strict=True))
    return Run(whole, busy or whole, cpu, spent.cpu_seconds, dict(spent.by_kind), full_step, outputs, first_tokens)


def open_llm(directory: Path, threads: int, config: KvCacheConfig) -> tuple[LLM, EngineTime]:
    engine, spent = open_engine(directory, threads), EngineTime()
    spent.watch(engine)
    llm = LLM.from_engine(engine, tokenizer=directory / CHECKPOINT, kv_cache_config=config)
    run_work(llm, spent, Work([[3, 4, 5]] * 2, [2, 2]), 2)
    gc.collect()
    gc.freeze()  # as servers do: what the libraries have loaded is no garbage, and takes long to look through
    return llm, spent
