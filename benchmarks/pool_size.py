"""Does a step's cost depend on the size of the pools?

The same decode step and the same compression run over small and large pools, with blocks spread over all of them. A
pool that were copied anywhere would show: the large ones hold gigabytes.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable
from functools import partial
from typing import Annotated

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
from minicache_trt.config import BuildConfig
from minicache_trt.units import format_bytes

SHAPE = Shape(4, 512, 1408, 8, 4, 4096, 4096)


def main(
    small: Annotated[int, typer.Option(help="Blocks of each small pool.")] = 64,
    large: Annotated[int, typer.Option(help="Blocks of each large pool.")] = 4096,
    methods: Annotated[str, typer.Option(help="Comma-separated.")] = "full,kivi4,minicache",
    batch_size: Annotated[int, typer.Option(help="Sequences of a decode step, blocks of a compression.")] = 4,
    context: Annotated[int, typer.Option(help="Tokens of each sequence.")] = 512,
    calls: Annotated[int, typer.Option(help="Steps per measurement; the median counts.")] = 50,
    rounds: Annotated[int, typer.Option(help="Paired measurements.")] = 7,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 1,
    cache_dir: CacheDir = CACHE_DIR,
    json: JsonFile = None,
) -> None:
    """Print the time of a step with small and with large pools."""
    checkpoint = random_llama(cache_dir, SHAPE)
    rows, results = [], []
    for method in methods.split(","):
        directory = engine_directory(cache_dir, checkpoint, method, BuildConfig(max_seq_len=context))
        decode: dict[str, Callable[[], float]] = {}
        compress: dict[str, Callable[[], float]] = {}
        sizes = {}
        for name, blocks in (("small", small), ("large", large)):
            engine = open_engine(directory, threads)
            compressed = blocks if engine.plan.compresses else 1
            sizes[name] = fill_pools(engine, blocks, compressed)
            step = decode_step(engine, batch_size, context, blocks, compressed)
            decode[name] = partial(seconds_per_call, partial(engine.decode, step), calls)
            ids = block_ids(blocks, batch_size)
            pairs = (ids, ids, np.arange(batch_size, dtype=np.int32))
            compress[name] = partial(seconds_per_call, partial(engine.compress, *pairs), calls)
        for what, contenders in (("decode", decode), ("compress", compress)):
            if what == "compress" and method == "full":
                continue
            stderr.print(f"{method} {what}, seconds per step")
            samples = alternate(contenders, rounds)
            ratio = Ratio.of(samples["large"], samples["small"])
            milliseconds = [f"{1e3 * statistics.median(samples[name]):.3f}" for name in ("small", "large")]
            rows.append([f"{method} {what}", *(format_bytes(size) for size in sizes.values()), *milliseconds, ratio])
            results.append(
                {
                    "method": method,
                    "step": what,
                    "pool_bytes": sizes,
                    "seconds": samples,
                    "ratio": dataclasses.asdict(ratio),
                }
            )
    columns = ("step", f"{small} blocks", f"{large} blocks", "small (ms)", "large (ms)", "large/small (range)")
    write_report(f"A step over small and large pools, {SHAPE.name}, {threads} thread(s)", columns, rows, results, json)


if __name__ == "__main__":
    run(main)
