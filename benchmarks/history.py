"""What does compressed history cost or save in a decode step, and what does compressing it cost?

The same decode step, batch 1, once over uncompressed and once over compressed history; weights are the same. Then the
time to compress one block of every stream, which happens once in 64 decode steps, as a share of those steps.
"""

from __future__ import annotations

import dataclasses
import gc
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from common import (
    CACHE_DIR,
    CacheDir,
    Shape,
    alternate,
    block_ids,
    decode_step,
    engine_directory,
    fill_pools,
    open_engine,
    random_llama,
    run,
    seconds_per_call,
)
from reporting import JsonFile, write_report

from minicache_trt.benchmark.timings import Ratio
from minicache_trt.cli.console import stderr
from minicache_trt.compression.size import ratio as size_ratio
from minicache_trt.config import BLOCK_SIZE, BuildConfig
from minicache_trt.runtime.tiered_cache import blocks_for


@dataclasses.dataclass(frozen=True)
class Setting:
    """What is the same for all methods."""

    cache_dir: Path
    checkpoint: Path
    contexts: tuple[int, ...]
    calls: int
    rounds: int
    threads: int

    def engine(self, method: str, weights: str) -> Any:
        """An engine with random history long enough for every context."""
        limits = BuildConfig(max_batch_size=1, max_seq_len=max(self.contexts), weights=weights)
        directory = engine_directory(self.cache_dir, self.checkpoint, method, limits)
        engine = open_engine(directory, self.threads)
        fill_pools(engine, *self.blocks(engine))
        return engine

    def blocks(self, engine: Any) -> tuple[int, int]:
        """Blocks of both tiers, block 0 included."""
        longest = blocks_for(max(self.contexts))
        return (8, 1 + longest) if engine.plan.compresses else (1 + longest, 1)

    def decode(self, engine: Any, context: int) -> Callable[[], float]:
        """Seconds of a decode step at a context."""
        step = decode_step(engine, 1, context, *self.blocks(engine))
        return partial(seconds_per_call, partial(engine.decode, step), self.calls)

    def compress(self, engine: Any) -> float:
        """Seconds to compress one block of every stream."""
        full, compressed = self.blocks(engine)
        pair = (block_ids(full, 1), block_ids(compressed, 1), np.ones(1, np.int32))
        return seconds_per_call(partial(engine.compress, *pair), self.calls)


def compare(setting: Setting, method: str, weights: str, full: Any) -> list[dict[str, Any]]:
    """One method against ``full``, at every context."""
    engine = setting.engine(method, weights)
    results = []
    for context in setting.contexts:
        stderr.print(f"{weights} weights, {method}, context {context}, seconds per step")
        contenders = {"full": setting.decode(full, context), method: setting.decode(engine, context)}
        samples = alternate(contenders, setting.rounds)
        compress = statistics.median(setting.compress(engine) for _ in range(setting.rounds))
        results.append(
            {
                "weights": weights,
                "method": method,
                "context": context,
                "cache_ratio": size_ratio(engine.plan, engine.model, context, engine.build.window),
                "full_seconds": samples["full"],
                "seconds": samples[method],
                "ratio": dataclasses.asdict(Ratio.of(samples[method], samples["full"])),
                "compress_seconds": compress,
                "compress_share": compress / (BLOCK_SIZE * statistics.median(samples[method])),
            }
        )
    return results


def main(
    methods: Annotated[str, typer.Option(help="Comma-separated.")] = "mean,kivi4,kivi2,minicache,minicache4",
    weights: Annotated[str, typer.Option(help="Weight formats, comma-separated.")] = "fp32,int4",
    contexts: Annotated[str, typer.Option(help="Tokens of the sequence, comma-separated.")] = "512,2048",
    kv_heads: Annotated[int, typer.Option(help="KV heads; 16 is one per query head.")] = 16,
    layers: Annotated[int, typer.Option(help="Layers of the random Llama.")] = 16,
    calls: Annotated[int, typer.Option(help="Steps per measurement; the median counts.")] = 9,
    rounds: Annotated[int, typer.Option(help="Paired measurements.")] = 5,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 1,
    cache_dir: CacheDir = CACHE_DIR,
    json: JsonFile = None,
) -> None:
    """Print decode time over compressed history relative to uncompressed."""
    shape = dataclasses.replace(Shape(), num_hidden_layers=layers, num_key_value_heads=kv_heads)
    lengths = tuple(int(context) for context in contexts.split(","))
    setting = Setting(cache_dir, random_llama(cache_dir, shape), lengths, calls, rounds, threads)
    results = []
    for fmt in weights.split(","):
        full = setting.engine("full", fmt)
        for method in methods.split(","):
            results += compare(setting, method, fmt, full)
            gc.collect()
    rows = [
        [
            f"{r['weights']}, {r['method']}, context {r['context']}",
            f"{r['cache_ratio']:.2f}x",
            f"{1e3 * statistics.median(r['full_seconds']):.1f}",
            f"{1e3 * statistics.median(r['seconds']):.1f}",
            Ratio(**r["ratio"]),
            f"{1e3 * r['compress_seconds']:.1f}",
            f"{r['compress_share']:.2%}",
        ]
        for r in results
    ]
    columns = (
        "weights, method, context", "cache smaller by", "full step (ms)", "step (ms)", "step / full (range)",
        "compress a block (ms)", "share of 64 steps",
    )  # fmt: skip
    write_report(
        f"Decode over compressed history, batch 1, {shape.name}, {threads} thread(s)", columns, rows, results, json
    )


if __name__ == "__main__":
    run(main)
