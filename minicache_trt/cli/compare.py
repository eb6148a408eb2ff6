"""``minicache-trt compare``: the engine against PyTorch, by its logits or layer by layer."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box

from minicache_trt.cli import options
from minicache_trt.cli.compare_layers import LayerOptions, compare_layers
from minicache_trt.cli.console import print_json, progress_bars, stdout, table
from minicache_trt.cli.run import open_llm, read_prompts
from minicache_trt.engine_directory import read_engine
from minicache_trt.errors import UserError

if TYPE_CHECKING:
    from minicache_trt.compare import Agreement, Comparison

LAYERS = "Layer by layer"


def compare(
    engine: options.EngineDir,
    prompt: options.Prompt = None,
    prompts: options.PromptFile = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate and compare per prompt.")] = 64,
    layers: Annotated[
        bool, typer.Option("--layers", help="Find the layer where two sides part.", rich_help_panel=LAYERS)
    ] = False,
    against: Annotated[
        str | None,
        typer.Option(
            help="Other side. With --layers: torch (this engine in PyTorch), uncompressed (the same without its plan), "
            "or another engine directory of the same model. Without: hf or tensorrt-llm, whose greedy tokens are "
            "compared.",
            show_default="torch with --layers",
        ),
    ] = None,
    peer_python: Annotated[
        Path | None,
        typer.Option(help="Python of an environment with tensorrt-llm.", show_default="this one"),
    ] = None,
    tolerance: Annotated[
        float | None,
        typer.Option(
            help="Relative error beyond which the sides part.",
            show_default="1e-3; 1e-2 with 2-bit codes; 0.1 with int8 or int4 weights",
            rich_help_panel=LAYERS,
        ),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Draw the errors into this .png, .svg or .pdf file.", rich_help_panel=LAYERS)
    ] = None,
    kv_cache_memory: options.CacheMemory = None,
    gpu_fraction: options.GpuFraction = None,
    threads: options.Threads = None,
    backend: options.Backend = None,
    json: options.Json = False,
) -> None:
    """Compare an engine with PyTorch: its logits, with the same plan and without compression; or each layer.

    The engine continues each prompt greedily; Hugging Face's model is then forced along the same tokens. The first
    table says whether the engine computes its plan correctly, the second what the plan costs in quality. With --layers,
    attention outputs and residual streams are compared instead, and the first layer that differs is named.

    [bold]Examples[/]

      minicache-trt compare -e engine --prompts prompts.txt --max-tokens 100

      minicache-trt compare -e engine --prompts prompts.txt --against hf

      minicache-trt compare -e engine -p "def main():" --layers --against uncompressed --plot layers.png
    """
    if layers:
        config = options.cache_config(kv_cache_memory, gpu_fraction)
        comparison = LayerOptions(against, tolerance, plot, max_tokens, threads, backend, config, json)
        compare_layers(engine, read_prompts(prompt, prompts), comparison)
        return
    from minicache_trt.cli.compare_peers import PEERS, peer_command, report_tokens

    needless: dict[str, object] = {"--tolerance": tolerance, "--plot": plot}
    if against not in PEERS:
        needless["--against"] = against
    if peer_python is not None and against != "tensorrt-llm":
        raise UserError("--peer-python belongs to --against tensorrt-llm")
    given = [name for name, value in needless.items() if value is not None]
    if given:
        raise UserError(f"{', '.join(given)} only goes with --layers", "add --layers")
    from minicache_trt.compare import compare_engine
    from minicache_trt.reference.ties import TOLERANCE

    texts = read_prompts(prompt, prompts)
    info = read_engine(engine)
    command = None if against is None else peer_command(against, engine, info, threads, peer_python)
    llm = open_llm(engine, threads, backend, options.cache_config(kv_cache_memory, gpu_fraction))
    if command is not None:
        report_tokens(llm, command, texts, max_tokens, engine, json)
        return
    with progress_bars(not json) as report:
        result = compare_engine(llm, engine, info, texts, max_tokens, partial(report, "compare"))
    if json:
        print_json(
            {"engine": str(engine), "method": info.plan.method, "weights": info.build.weights, **result.to_dict()}
        )
        return
    same = f"PyTorch with the same plan ({info.plan.method}) and weights ({info.build.weights})"
    _print(f"Engine against {same}", result, "reference")
    ties = result.ties()
    if ties.codes or ties.retained:
        stdout.print(
            f"compressed blocks: {ties.differing_codes} of {ties.codes} codes and {ties.differing_retained} of "
            f"{ties.retained} retained tokens differ, the farthest {ties.farthest:.1e} from its decision boundary; "
            f"{ties.disagreements} disagreements beyond {TOLERANCE:g}\n"
        )
    _print("Engine against PyTorch uncompressed: the quality cost", result, "uncompressed")


def _print(title: str, result: Comparison, against: str) -> None:
    rows = table(title, "prompt", "tokens", "max diff", "mean diff", "KL", "top-1", "prefix", "gap")
    rows.box, rows.caption_justify = box.SIMPLE, "left"
    rows.caption = (
        "diff: of logits; KL in nats; top-1: same most likely token; prefix: tokens until greedy decoding parts, "
        "gap: between PyTorch's two best logits there"
    )
    for index, item in enumerate(result.prompts):
        row: Agreement = getattr(item, against)
        gap = "" if row.part_gap is None else f"{row.part_gap:.1e}"
        rows.add_row(
            str(index),
            f"{item.prompt_tokens}+{item.generated_tokens}",
            f"{row.max_abs_diff:.1e}",
            f"{row.mean_abs_diff:.1e}",
            f"{row.kl:.1e}",
            f"{100 * row.top1_agreement:.1f} %",
            f"{row.common_prefix}/{row.positions}",
            gap,
        )
    total = result.summary(against)
    rows.add_section()
    rows.add_row(
        "all",
        "",
        f"{total['max_abs_diff']:.1e}",
        f"{total['mean_abs_diff']:.1e}",
        f"{total['kl']:.1e}",
        f"{100 * total['top1_agreement']:.1f} %",
        f"{total['common_prefix']:.0f}",
        "",
    )
    stdout.print(rows)
