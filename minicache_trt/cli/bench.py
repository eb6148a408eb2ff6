"""``minicache-trt bench``: how fast, at what memory."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from minicache_trt.cli import options
from minicache_trt.cli.console import print_json, progress_bars, stderr, stdout
from minicache_trt.engine_directory import EngineInfo, read_engine, tool_versions
from minicache_trt.errors import UserError

if TYPE_CHECKING:
    from minicache_trt.benchmark.measure import Cell, Contender, Grid
    from minicache_trt.benchmark.ours import Ours
    from minicache_trt.benchmark.peers import PeerCommand
    from minicache_trt.config import KvCacheConfig

GRID, PEER, OUTPUT = "What is measured", "Against another program", "Output"


def bench(
    context: typer.Context,
    engine: options.OptionalEngineDir = None,
    batch_sizes: Annotated[str, typer.Option(help="Prompts at a time, comma-separated.", rich_help_panel=GRID)] = "1,8",
    contexts: Annotated[
        str, typer.Option(help="Tokens of each prompt, comma-separated.", rich_help_panel=GRID)
    ] = "16,512",
    new_tokens: Annotated[int, typer.Option(help="Tokens generated after each.", rich_help_panel=GRID)] = 32,
    rounds: Annotated[int, typer.Option(help="Measurements, after one that warms up.", rich_help_panel=GRID)] = 3,
    against: Annotated[
        str | None,
        typer.Option(help="hf (transformers), onnxruntime-genai or tensorrt-llm, in turn.", rich_help_panel=PEER),
    ] = None,
    peer_model: Annotated[
        Path | None, typer.Option(help="onnxruntime-genai's export of the same checkpoint.", rich_help_panel=PEER)
    ] = None,
    peer_python: Annotated[
        Path | None,
        typer.Option(
            help="Python of an environment with onnxruntime-genai or tensorrt-llm.",
            show_default="the one benchmarks/peers.py sets up; this one",
            rich_help_panel=PEER,
        ),
    ] = None,
    kv_cache_memory: options.CacheMemory = None,
    gpu_fraction: options.GpuFraction = None,
    threads: options.Threads = None,
    backend: options.Backend = None,
    plot: Annotated[
        Path | None, typer.Option(help="Write plots (PNG) into this directory.", rich_help_panel=OUTPUT)
    ] = None,
    csv: Annotated[Path | None, typer.Option(help="Write medians to this file.", rich_help_panel=OUTPUT)] = None,
    json: options.Json = False,
) -> None:
    """Measure prefill and decode throughput, latency and memory with random prompts.

    Decoding is timed in the steps that have all sequences; prefill until the last sequence has its first token.
    With --against, both sides run in turn on the same prompts, and ratios are taken within a round.

    [bold]Examples[/]

      minicache-trt bench -e engine --threads 1

      minicache-trt bench -e engine --batch-sizes 1,4 --contexts 128,1024 --plot plots --json

      minicache-trt bench -e engine --against hf

      minicache-trt bench -e engine --against onnxruntime-genai --peer-model EXPORT

      minicache-trt bench serve --url http://127.0.0.1:8000
    """
    if context.invoked_subcommand is not None:
        _refuse_options(context)
        return
    if engine is None:
        raise UserError(
            "bench: missing option --engine", "or measure a running server: minicache-trt bench serve --url URL"
        )
    info = read_engine(engine)
    grid = _grid(batch_sizes, contexts, new_tokens, rounds)
    grid.check(info.build)
    cache = options.cache_config(kv_cache_memory, gpu_fraction)
    for flag, path in (("--csv", csv), ("--plot", plot)):
        options.check_output(flag, path)
    about: dict[str, Any] = {}
    command = _peer_command(engine, info, grid, threads, against, peer_model, peer_python)
    with ExitStack() as stack, stderr.status(Text(f"loading {engine}")) as status:
        contenders: list[Contender] = [_open(engine, threads, backend, cache)]
        if command is not None:
            from minicache_trt.benchmark.peers import Peer

            status.update(Text(f"starting {command.name}"))
            peer = Peer(command)
            stack.callback(peer.close)
            contenders.append(peer)
            about[peer.name] = peer.about
        status.stop()
        cells = _measure(contenders, grid, info, command, not json)
    if json:
        from minicache_trt.benchmark.report import to_json

        print_json({**_settings(engine, info, grid, threads, backend), "peers": about, "cells": to_json(cells)})
    else:
        _print(cells)
    _write(cells, engine, info, csv, plot)


def _refuse_options(context: typer.Context) -> None:
    """Options of this verb mean nothing before a subcommand."""
    given = [
        name for name in context.params if getattr(context.get_parameter_source(name), "name", "") == "COMMANDLINE"
    ]
    if given:
        flag = f"--{given[0].replace('_', '-')}"
        raise UserError(
            f"{flag} does not belong before {context.invoked_subcommand}", "options of a subcommand follow it"
        )


def _grid(batch_sizes: str, contexts: str, new_tokens: int, rounds: int) -> Grid:
    from minicache_trt.benchmark.measure import Grid

    lists = options.positive_numbers("--batch-sizes", batch_sizes), options.positive_numbers("--contexts", contexts)
    try:
        return Grid(*lists, new_tokens, rounds)
    except ValueError as error:
        raise UserError(f"--{str(error).replace('_', '-')}") from error


def _peer_command(
    engine: Path,
    info: EngineInfo,
    grid: Grid,
    threads: int | None,
    against: str | None,
    model: Path | None,
    python: Path | None,
) -> PeerCommand | None:
    """How to start the peer, when there is one and it can be started."""
    from minicache_trt.benchmark import peers

    if against is not None and against not in peers.PEERS:
        raise UserError(f"--against: unknown peer {against!r}", f"peers: {', '.join(peers.PEERS)}")
    if against == "tensorrt-llm":
        if model is not None:
            raise UserError("--peer-model belongs to --against onnxruntime-genai")
        return peers.tensorrt_llm(python, engine, max(grid.batch_sizes), grid.length)
    if against != "onnxruntime-genai":
        if model is not None or python is not None:
            raise UserError("--peer-model and --peer-python belong to --against onnxruntime-genai")
        if against is None:
            return None
        return peers.hugging_face(engine, threads, max(grid.contexts))
    if model is None:
        raise UserError(
            "--against onnxruntime-genai needs --peer-model, its own export of the checkpoint",
            "python benchmarks/peers.py makes one",
        )
    chosen = python or peers.GENAI_ENVIRONMENT / "bin" / "python"
    return peers.onnxruntime_genai(chosen, model, info.model, grid.length, threads)


def _open(engine: Path, threads: int | None, backend: str | None, config: KvCacheConfig) -> Ours:
    from minicache_trt.benchmark.ours import Ours
    from minicache_trt.build import load_engine
    from minicache_trt.runtime.llm import LLM

    # Rounds repeat their prompts, and every one is to be prefilled.
    config = replace(config, enable_block_reuse=False)
    return Ours(LLM.from_engine(load_engine(engine, threads, backend), kv_cache_config=config))


def _measure(
    contenders: list[Contender], grid: Grid, info: EngineInfo, command: PeerCommand | None, show: bool
) -> list[Cell]:
    from minicache_trt.benchmark.measure import measure, random_prompts

    reserved = command.reserved_ids if command else frozenset()
    prompts = random_prompts(info.model, max(grid.batch_sizes), max(grid.contexts), reserved)
    with progress_bars(show) as report:
        return list(measure(contenders, grid, prompts, partial(report, "runs")))


def _write(cells: list[Cell], engine: Path, info: EngineInfo, csv: Path | None, plot: Path | None) -> None:
    if csv is not None:
        from minicache_trt.benchmark.report import write_csv

        write_csv(cells, csv)
    if plot is not None:
        from minicache_trt.benchmark.plots import write_plots

        write_plots(cells, plot, f"{engine.name}, method {info.plan.method}, {info.build.weights} weights")


def _settings(engine: Path, info: EngineInfo, grid: Grid, threads: int | None, backend: str | None) -> dict[str, Any]:
    return {
        "engine": str(engine),
        "method": info.plan.method,
        "weights": info.build.weights,
        "backend": backend or info.build.backend,
        "threads": threads,
        "new_tokens": grid.new_tokens,
        "rounds": grid.rounds,
        "tools": tool_versions(),
    }


def _print(cells: list[Cell]) -> None:
    from minicache_trt.benchmark.report import tables

    for rows in tables(cells):
        stdout.print(rows)
