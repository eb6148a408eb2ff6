"""What does serving many requests at once gain, and what does the runtime around the engine cost?

* *streams*: requests of mixed lengths, many at once through ``generate_async``, and one after the other. Outputs of the
  two are compared; where they part, the logits of the tokens chosen together, alone and teacher-forced, tell how far
  they were from the best ones. The runtime's share is everything but the time inside the engine's ``decode`` and
  ``compress``: scheduling, packing, sampling, text, and whatever else runs in the process.
* *scarce*: requests with long answers, in a cache of a quarter of the bytes they would use together.
* *prefix*: time to first token of a second prompt that begins as a first one did, over that of the first.
"""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from common import CACHE_DIR, REPOSITORY, CacheDir, Shape, engine_directory, open_engine, random_llama, run
from reporting import JsonFile, write_report

from minicache_trt.cli.console import quiet_transformers, stderr
from minicache_trt.config import BuildConfig, KvCacheConfig
from minicache_trt.engine_directory import CHECKPOINT
from minicache_trt.errors import UserError
from minicache_trt.load.lengths import LogNormal
from minicache_trt.runtime.llm import LLM
from minicache_trt.runtime.sampling_params import SamplingParams
from minicache_trt.units import format_bytes

DEMO = REPOSITORY / "examples" / "demo_model" / "checkpoint"
SHAPE = Shape()
PARTS = ("streams", "scarce", "prefix")
PREFIX, SUFFIX = 1000, 24


@dataclasses.dataclass
class EngineTime:
    """Seconds inside an engine; its ``decode`` and ``compress`` are replaced by ones that count."""

    seconds: float = 0.0
    calls: int = 0

    def watch(self, engine: Any) -> None:
        for name in ("decode", "compress"):
            setattr(engine, name, self._timed(getattr(engine, name)))

    def _timed(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any) -> Any:
            start = time.perf_counter()
            try:
                return call(*arguments)
            finally:
                self.seconds += time.perf_counter() - start
                self.calls += 1

        return timed


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
class Run:
    """One pass over the work."""

    seconds: float
    engine_seconds: float
    outputs: list[list[int]]
    first_tokens: list[float]

    @property
    def tokens_per_second(self) -> float:
        return sum(map(len, self.outputs)) / self.seconds

    @property
    def runtime_share(self) -> float:
        return 1 - self.engine_seconds / self.seconds

    def figures(self) -> dict[str, float]:
        return {
            "seconds": self.seconds,
            "engine_seconds": self.engine_seconds,
            "tokens_per_second": self.tokens_per_second,
            "runtime_share": self.runtime_share,
            "median_time_to_first_token": statistics.median(self.first_tokens),
        }


def run_work(llm: LLM, spent: EngineTime, work: Work, streams: int) -> Run:
    """All requests in order, ``streams`` at a time."""

    async def one(index: int, places: asyncio.Semaphore) -> tuple[list[int], float]:
        async with places:
            return await generate(index)

    async def generate(index: int) -> tuple[list[int], float]:
        start, first, tokens, reason = time.perf_counter(), None, [], None
        async for update in llm.generate_async(work.prompts[index], work.params(index)):
            first = first or time.perf_counter() - start
            tokens += update.outputs[0].token_ids_diff
            reason = update.outputs[0].finish_reason
        if reason != "length" or len(tokens) != work.output_lens[index]:
            raise RuntimeError(f"request {index} ended with {reason} after {len(tokens)} of {work.output_lens[index]}")
        return tokens, first or 0.0

    async def everything() -> list[tuple[list[int], float]]:
        places = asyncio.Semaphore(streams)
        return await asyncio.gather(*(one(index, places) for index in range(len(work.prompts))))

    before, start = spent.seconds, time.perf_counter()
    results = asyncio.run(everything())
    seconds = time.perf_counter() - start
    return Run(seconds, spent.seconds - before, *map(list, zip(*results, strict=True)))


def differences(llm: LLM, work: Work, alone: Run, together: Run) -> dict[str, Any]:
    """How many outputs differ, and how far below the best logit their tokens are, as a share of the logits' range."""
    parts = [index for index, output in enumerate(alone.outputs) if output != together.outputs[index]]
    worst = 0.0
    for index in parts:
        prompt, output = work.prompts[index], together.outputs[index]
        (logits,) = llm.score([prompt + output], [len(prompt)], start=len(prompt) - 1)
        rows = logits[: len(output)]
        gaps = rows.max(-1) - rows[np.arange(len(output)), output]
        worst = max(worst, float((gaps / (rows.max(-1) - rows.min(-1))).max()))
    return {"streams": len(alone.outputs), "differing": len(parts), "largest_gap_share": worst}


def open_llm(directory: Path, threads: int, config: KvCacheConfig) -> tuple[LLM, EngineTime]:
    engine, spent = open_engine(directory, threads), EngineTime()
    spent.watch(engine)
    llm = LLM.from_engine(engine, tokenizer=directory / CHECKPOINT, kv_cache_config=config)
    run_work(llm, spent, Work([[3, 4, 5]] * 2, [2, 2]), 2)
    gc.collect()
    gc.freeze()  # as servers do: what the libraries have loaded is no garbage, and takes long to look through
    return llm, spent


def streams(
    directory: Path, threads: int, work: Work, num_streams: int, alone_requests: int, rounds: int
) -> tuple[list[list[object]], dict[str, Any]]:
    """Together and, the first ``alone_requests`` of them, one by one, in turn."""
    first = Work(work.prompts[:alone_requests], work.output_lens[:alone_requests])
    llm, spent = open_llm(directory, threads, KvCacheConfig(enable_block_reuse=False))
    alone, together = [], []
    for done in range(rounds):
        together.append(run_work(llm, spent, work, num_streams))
        alone.append(run_work(llm, spent, first, 1))
        rates = [side[-1].tokens_per_second for side in (alone, together)]
        stderr.print(f"round {done + 1}/{rounds}: alone {rates[0]:.4g}, together {rates[1]:.4g} tokens/s")
    found = [differences(llm, first, a, b) for a, b in zip(alone, together, strict=True)]
    close(llm)
    ratio = statistics.median(b.tokens_per_second / a.tokens_per_second for a, b in zip(alone, together, strict=True))
    rows: list[list[object]] = []
    for name, runs in (("one stream", alone), (f"{num_streams} streams", together)):
        rate = statistics.median(item.tokens_per_second for item in runs)
        share = statistics.median(item.runtime_share for item in runs)
        rows.append([name, f"{rate:.1f} tokens/s", f"runtime {share:.1%}"])
    compared = f"{found[0]['differing']} of {len(first.prompts)} outputs differ"
    rows.append([f"{num_streams} streams over one", f"{ratio:.2f}x", compared])
    results = {
        "one": [item.figures() for item in alone],
        "together": [item.figures() for item in together],
        "ratio": ratio,
        "differences": found,
    }
    return rows, results


def scarce(directory: Path, threads: int, work: Work) -> tuple[list[list[object]], dict[str, Any]]:
    """A quarter of the bytes; every request must end as it should, with the tokens it has in a large cache."""
    llm, spent = open_llm(directory, threads, KvCacheConfig(enable_block_reuse=False))
    ample = run_work(llm, spent, work, len(work.prompts))
    used = llm.statistics.full_bytes_used + llm.statistics.compressed_bytes_used
    close(llm)
    llm, spent = open_llm(directory, threads, KvCacheConfig(used // 4, enable_block_reuse=False))
    tight = run_work(llm, spent, work, len(work.prompts))
    preemptions = llm.statistics.preemptions
    found = differences(llm, work, ample, tight)
    close(llm)
    rows: list[list[object]] = [
        ["cache for everybody", f"{ample.tokens_per_second:.1f} tokens/s", format_bytes(used)],
        ["a quarter of it", f"{tight.tokens_per_second:.1f} tokens/s", f"{preemptions} preemptions"],
        ["", f"{len(tight.outputs)} complete", f"{found['differing']} differ"],
    ]
    figures = {"ample": ample.figures(), "tight": tight.figures()}
    return rows, {"cache_bytes_used": used, "preemptions": preemptions, "differences": found, **figures}


def close(llm: LLM) -> None:
    """The end; every block must be back."""
    llm.shutdown()
    llm.check_integrity()


def prefix(directory: Path, threads: int, vocab_size: int, rounds: int) -> tuple[list[list[object]], dict[str, Any]]:
    """A new prefix each round."""
    llm, spent = open_llm(directory, threads, KvCacheConfig())
    rng = np.random.default_rng(1)
    run_work(llm, spent, Work([rng.integers(3, vocab_size, PREFIX).tolist()], [2]), 1)
    pairs = []
    for _ in range(rounds):
        shared = rng.integers(3, vocab_size, PREFIX).tolist()
        work = Work([shared + rng.integers(3, vocab_size, SUFFIX).tolist() for _ in range(2)], [8, 8])
        pairs.append(run_work(llm, spent, work, 1).first_tokens)
    close(llm)
    ratio = statistics.median(second / first for first, second in pairs)
    row: list[object] = [
        "second prompt's time to first token",
        f"{ratio:.1%} of the first's",
        f"{PREFIX} shared tokens",
    ]
    return [row], {"seconds": pairs, "ratio": ratio}


def main(
    checkpoint: Annotated[
        Path | None, typer.Option(help="Default: the bundled demo model. 'random': a random Llama of 213 M.")
    ] = None,
    method: Annotated[str, typer.Option(help="Compression method.")] = "kivi4",
    weights: Annotated[str, typer.Option(help="fp32, int8 or int4.")] = "fp32",
    parts: Annotated[str, typer.Option(help=f"Of {', '.join(PARTS)}.")] = ",".join(PARTS),
    num_streams: Annotated[int, typer.Option(help="Requests at once.")] = 64,
    num_requests: Annotated[int, typer.Option(help="Requests in all, in the place of each that ends the next.")] = 192,
    alone: Annotated[int | None, typer.Option(help="Of these also one by one.", show_default="all")] = None,
    mean: Annotated[int, typer.Option(help="Mean tokens of prompts and of answers.")] = 96,
    most: Annotated[int, typer.Option(help="Most tokens of a prompt, and of an answer.")] = 384,
    rounds: Annotated[int, typer.Option(help="Paired measurements.")] = 3,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 1,
    cache_dir: CacheDir = CACHE_DIR,
    json: JsonFile = None,
) -> None:
    """Print throughput, the runtime's share, and what prefixes and scarcity do."""
    quiet_transformers()
    chosen = parts.split(",")
    if not set(chosen) <= set(PARTS):
        raise UserError(f"--parts: expected some of {', '.join(PARTS)}, got {parts}")
    source = random_llama(cache_dir, SHAPE) if str(checkpoint) == "random" else checkpoint or DEMO
    limits = BuildConfig(
        max_batch_size=num_streams,
        max_seq_len=max(2 * most, PREFIX + SUFFIX + 64),
        max_num_tokens=1024,
        weights=weights,
    )
    directory = engine_directory(cache_dir, source, method, limits)
    vocab_size = open_engine(directory, threads).model.vocab_size
    work = Work.mixed(num_requests, vocab_size, mean, most)
    rows: list[list[object]] = []
    results: dict[str, Any] = {"prompt_lens": list(map(len, work.prompts)), "output_lens": work.output_lens}
    if "streams" in chosen:
        new, results["streams"] = streams(directory, threads, work, num_streams, alone or num_requests, rounds)
        rows += new
    if "scarce" in chosen:
        new, results["scarce"] = scarce(directory, threads, Work.growing(num_streams, vocab_size, most))
        rows += new
    if "prefix" in chosen:
        new, results["prefix"] = prefix(directory, threads, vocab_size, rounds + 2)
        rows += new
    title = f"Serving {source.name if checkpoint else 'the demo model'}, {method}, {weights}, {threads} thread(s)"
    write_report(title, ("what", "speed", "also"), rows, results, json)


if __name__ == "__main__":
    run(main)
