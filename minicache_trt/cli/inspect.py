"""``minicache-trt inspect``: what an engine directory holds."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from minicache_trt.cli import inspect_streams, options
from minicache_trt.cli.console import print_json, stderr, stdout, table
from minicache_trt.cli.plan import layer_table, plan_summary
from minicache_trt.cli.run import read_prompts
from minicache_trt.compression.size import layer_costs
from minicache_trt.contract import compressed_pools, decoder_inputs, full_pools
from minicache_trt.engine_directory import ENGINES, EngineInfo, read_engine
from minicache_trt.errors import UserError
from minicache_trt.plots.figure import check_directory
from minicache_trt.units import format_bytes


def inspect(
    engine: options.EngineDir,
    plot: Annotated[
        Path | None,
        typer.Option(
            help="Run prompts and draw similarity, norms and angles of the keys and values of neighbouring layers "
            "into this directory."
        ),
    ] = None,
    prompt: options.Prompt = None,
    prompts: options.PromptFile = None,
    threads: options.Threads = None,
    json: options.Json = False,
) -> None:
    """Check an engine directory and show what it is: model, plan, limits, files, tensors.

    With --plot, show instead how alike its layers' keys and values are on some prompts, and which of them it merges.

    [bold]Examples[/]

      minicache-trt inspect -e engine

      minicache-trt inspect -e engine --prompts prompts.txt --plot plots
    """
    if plot is None:
        if prompt or prompts is not None:
            raise UserError("--prompt and --prompts only go with --plot", "add --plot DIRECTORY")
        _describe(engine, read_engine(engine), json)
        return
    check_directory(plot)
    info = read_engine(engine)
    statistics = inspect_streams.measure(engine, info, read_prompts(prompt, prompts), threads, not json)
    plots = inspect_streams.save_plots(statistics, plot, engine, info)
    if json:
        print_json({"engine": str(engine), "method": info.plan.method, **inspect_streams.to_json(statistics, plots)})
        return
    inspect_streams.print_statistics(statistics)
    stderr.print(f"wrote {', '.join(plots)}", soft_wrap=True)


def _describe(engine: Path, info: EngineInfo, json: bool) -> None:
    summary = plan_summary(info.plan, info.model, info.build.max_seq_len, info.build.window)
    if json:
        data = {**info.to_dict(), "cache": summary, "tensors": _tensors(info)}
        if ENGINES in info.files:
            from minicache_trt.cli.inspect_engines import engines_json

            data["tensorrt"] = engines_json(engine)
        print_json(data)
        return
    rows = table(f"Engine {engine}", "what", "value")
    model, build = info.model, info.build
    form = "dummy weights" if info.source["dummy"] else info.source.get("format", "Hugging Face checkpoint")
    rows.add_row("source", f"{info.source['name']} ({form})")
    rows.add_row(
        "model",
        f"{model.family}, {model.num_layers} layers, hidden {model.hidden_size}, heads {model.num_heads}:"
        f"{model.num_kv_heads}, head_dim {model.head_dim}, vocabulary {model.vocab_size}",
    )
    rows.add_row(
        "method", f"{info.plan.method}, {summary['ratio']:.2f}x smaller than 16 bit at {build.max_seq_len} tokens"
    )
    for name, value in asdict(build).items():
        rows.add_row(name.replace("_", " "), str(value))
    rows.add_row("built with", ", ".join(f"{name} {version}" for name, version in info.tools.items()))
    stdout.print(rows)
    stdout.print(layer_table("Cache per layer", layer_costs(info.plan, model)))
    files = table("Files (sizes and hashes verified)", "file", "size")
    for name, entry in info.files.items():
        files.add_row(name, format_bytes(entry["bytes"]))
    stdout.print(files)
    tensors = table("Decoder inputs and cache pools", "tensor", "type", "shape", left=3)
    for row in _tensors(info):
        tensors.add_row(row["name"], row["type"], f"[{', '.join(map(str, row['shape']))}]")
    stdout.print(tensors)
    if ENGINES in info.files:
        from minicache_trt.cli.inspect_engines import print_engines

        print_engines(engine)


def _tensors(info: EngineInfo) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = [
        {"name": name, "type": "int32", "shape": list(shape)} for name, shape in decoder_inputs(info.plan).items()
    ]
    for blocks, pools in (("Nf", full_pools(info.model)), ("Nc", compressed_pools(info.plan, info.model))):
        for pool in pools:
            kind = info.build.dtype if pool.dtype == "model" else pool.dtype
            rows.append({"name": pool.name, "type": kind, "shape": [blocks, *pool.shape]})
    return rows
