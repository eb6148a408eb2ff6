"""How fast do we prefill and decode, and how dear is a build, against onnxruntime-genai on the same checkpoint?

Both sides are greedy, hold an uncompressed cache, prefill all prompts in one step and run on the same number of
threads, each in a process of its own. Theirs is exported by its own builder with its own defaults; int4 weights have
blocks of 32 and compute at accuracy level 4 on both sides.
"""

from __future__ import annotations

import dataclasses
import statistics
from contextlib import closing
from pathlib import Path
from typing import Annotated, Any

import typer
from common import CACHE_DIR, CacheDir, Shape, engine_directory, random_llama, run
from costs import Cost
from peers import ENVIRONMENT, EXPORTS, EnvironmentDir, ExportDir, PipArgs, costs, environment
from reporting import JsonFile, write_report

from minicache_trt.benchmark.measure import Cell, Grid, measure, random_prompts
from minicache_trt.benchmark.ours import Ours
from minicache_trt.benchmark.peers import Peer, onnxruntime_genai
from minicache_trt.build import load_engine
from minicache_trt.cli.console import stderr
from minicache_trt.config import BuildConfig, KvCacheConfig
from minicache_trt.runtime.llm import LLM
from minicache_trt.units import format_bytes

COLUMNS = ("", "ours", "onnxruntime-genai", "ours / theirs, median (range)")


def cells(checkpoint: Path, cache_dir: Path, peer: tuple[Path, Path], weights: str, grid: Grid, threads: int) -> Any:
    """Measure a grid; ``peer`` is the Python and the export of the other side."""
    batch = max(grid.batch_sizes)
    # One step prefills all prompts, so that every decode step has all sequences.
    build = BuildConfig(batch, grid.length, batch * max(grid.contexts), weights)
    engine = load_engine(engine_directory(cache_dir, checkpoint, "full", build), num_threads=threads)
    ours = Ours(LLM.from_engine(engine, kv_cache_config=KvCacheConfig(active_prefills=batch, enable_block_reuse=False)))
    command = onnxruntime_genai(*peer, engine.model, grid.length, threads)
    prompts = random_prompts(engine.model, batch, max(grid.contexts), command.reserved_ids)
    with closing(Peer(command)) as theirs:

        def progress(done: int, total: int) -> None:
            stderr.print(f"{weights}: run {done}/{total}")

        yield from measure([ours, theirs], grid, prompts, progress)


def cell_rows(weights: str, cell: Cell) -> list[list[object]]:
    """Decode, prefill and peak memory of a cell."""
    ours, theirs = cell.figures.values()
    name = f"{weights}, batch {cell.batch}, context {cell.context}"
    median = statistics.median
    return [
        [
            f"{name}: decode, tokens/s", median(ours.decode_tokens_per_second),
            median(theirs.decode_tokens_per_second), cell.ratios["decode"],
        ],
        [
            f"{name}: prefill, tokens/s", median(ours.prefill_tokens_per_second),
            median(theirs.prefill_tokens_per_second), cell.ratios["prefill"],
        ],
        [f"{name}: peak memory", *(format_bytes(side.peak_bytes or 0) for side in (ours, theirs)), ""],
    ]  # fmt: skip


def build_rows(weights: str, taken: dict[str, Cost]) -> list[list[object]]:
    """Time and memory of one build on each side."""
    ours, theirs = taken["minicache-trt"], taken["onnxruntime-genai"]
    return [
        [f"{weights}: build, s", ours.seconds, theirs.seconds, f"{ours.seconds / theirs.seconds:.2f}"],
        [
            f"{weights}: build, peak memory", format_bytes(ours.peak_bytes), format_bytes(theirs.peak_bytes),
            f"{ours.peak_bytes / theirs.peak_bytes:.2f}",
        ],
    ]  # fmt: skip


def main(
    weights: Annotated[str, typer.Option(help="Comma-separated: fp32, int4.")] = "fp32,int4",
    batch_sizes: Annotated[str, typer.Option(help="Comma-separated.")] = "1,8",
    contexts: Annotated[str, typer.Option(help="Comma-separated.")] = "16,512",
    new_tokens: Annotated[int, typer.Option(help="Tokens generated; the first one is prefill's.")] = 33,
    rounds: Annotated[int, typer.Option(help="Paired measurements.")] = 5,
    threads: Annotated[int, typer.Option(help="CPU threads of either side.")] = 1,
    environment_dir: EnvironmentDir = ENVIRONMENT,
    exports: ExportDir = EXPORTS,
    pip_args: PipArgs = "",
    cache_dir: CacheDir = CACHE_DIR,
    json: JsonFile = None,
) -> None:
    """Print prefill, decode and build beside onnxruntime-genai's."""
    grid = Grid(*(tuple(map(int, text.split(","))) for text in (batch_sizes, contexts)), new_tokens, rounds)
    python = environment(environment_dir, pip_args)
    checkpoint = random_llama(cache_dir, Shape())
    exports.mkdir(parents=True, exist_ok=True)
    rows: list[list[object]] = []
    results = []
    for name in weights.split(","):
        output, taken = costs(python, checkpoint, exports, name)
        rows += build_rows(name, taken)
        result: dict[str, Any] = {"weights": name, "cells": []}
        result["build"] = {contender: dataclasses.asdict(cost) for contender, cost in taken.items()}
        for cell in cells(checkpoint, cache_dir, (python, output), name, grid, threads):
            rows += cell_rows(name, cell)
            stderr.print(f"{name} {cell.batch} x {cell.context}: {cell.ratios}")
            result["cells"].append(dataclasses.asdict(cell))
        results.append(result)
    title = f"Against onnxruntime-genai, {checkpoint.name}, {threads} thread(s), {rounds} rounds"
    write_report(title, COLUMNS, rows, results, json)


if __name__ == "__main__":
    run(main)
