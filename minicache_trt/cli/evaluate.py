"""``minicache-trt eval``: what compression costs in quality, method by method."""

from __future__ import annotations

import hashlib
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from minicache_trt.cli import options
from minicache_trt.cli.console import print_json, progress_bars, quiet_transformers, stderr, stdout
from minicache_trt.cli.eval_contenders import Chosen, contenders_of
from minicache_trt.compression.methods import METHODS
from minicache_trt.config import WEIGHT_FORMATS, BuildConfig, ModelConfig
from minicache_trt.engine_directory import tool_versions
from minicache_trt.errors import UserError
from minicache_trt.quantization.store import WeightOptions

if TYPE_CHECKING:
    from minicache_trt.evaluation.contenders import Contender
    from minicache_trt.evaluation.harness import HarnessTasks
    from minicache_trt.evaluation.tasks import Settings

WHO, WHAT, HARNESS, OUTPUT = "Who is compared", "What is measured", "lm-eval-harness", "Output"
DEFAULT_TASKS = "perplexity,repeat"


def evaluate(
    engine: Annotated[
        Path | None,
        typer.Option("--engine", "-e", help="Engine directory: as it is, a row of its own.", rich_help_panel=WHO),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help="Preset, hub id or checkpoint, in place of --engine.", rich_help_panel=WHO),
    ] = None,
    methods: Annotated[
        str | None,
        typer.Option(help=f"Comma-separated: {', '.join(METHODS)}. Full is always there.", rich_help_panel=WHO),
    ] = None,
    plan: Annotated[
        list[Path] | None, typer.Option("--plan", help="plan.json; may be given several times.", rich_help_panel=WHO)
    ] = None,
    merge_start: Annotated[
        int | None, typer.Option(help="First merged layer of merging methods.", rich_help_panel=WHO)
    ] = None,
    calibration_text: options.CalibrationText = None,
    weights: Annotated[
        str | None,
        typer.Option(
            *options.WEIGHT_FLAGS,
            help=f"Weights of engines built here, comma-separated: {', '.join(WEIGHT_FORMATS)}; the first one without "
            "compression is what all rows are compared with.",
            rich_help_panel=WHO,
        ),
    ] = None,
    group_size: Annotated[
        str | None,
        typer.Option(
            *options.GROUP_FLAGS,
            help="Of int8 and int4, comma-separated; default the engine's, or 32.",
            rich_help_panel=WHO,
        ),
    ] = None,
    calibration_samples: options.CalibrationSamples = WeightOptions.samples,
    revision: options.Revision = None,
    tasks: Annotated[
        str,
        typer.Option(
            help="Comma-separated: perplexity, repeat, copy, passkey, keyvalue, or lm-eval-harness's.",
            rich_help_panel=WHAT,
        ),
    ] = DEFAULT_TASKS,
    text: Annotated[
        Path | None,
        typer.Option(
            help="UTF-8 text the model has not seen; documents separated by newline and NUL.", rich_help_panel=WHAT
        ),
    ] = None,
    length: Annotated[int, typer.Option(help="Tokens of a sequence.", rich_help_panel=WHAT)] = 512,
    windows: Annotated[int, typer.Option(help="Windows of text.", rich_help_panel=WHAT)] = 64,
    examples: Annotated[int, typer.Option(help="Examples of every other task.", rich_help_panel=WHAT)] = 40,
    lengths: Annotated[
        str | None, typer.Option(help="Lengths of examples, comma-separated; default --length.", rich_help_panel=WHAT)
    ] = None,
    depths: Annotated[
        str, typer.Option(help="passkey: where it is told, comma-separated.", rich_help_panel=WHAT)
    ] = "0,0.25,0.5,0.75,1",
    segment: Annotated[int, typer.Option(help="repeat, copy: random tokens.", rich_help_panel=WHAT)] = 150,
    queries: Annotated[int, typer.Option(help="keyvalue: names asked for.", rich_help_panel=WHAT)] = 4,
    seed: Annotated[int, typer.Option(help="Of everything random.", rich_help_panel=WHAT)] = 0,
    include_path: Annotated[
        Path | None, typer.Option(help="Folder with task files of your own.", rich_help_panel=HARNESS)
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Documents of each task.", rich_help_panel=HARNESS)] = None,
    num_fewshot: Annotated[int | None, typer.Option(min=0, help="Examples shown.", rich_help_panel=HARNESS)] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences at a time in engines built here.")] = 16,
    threads: options.Threads = None,
    backend: options.Backend = None,
    plot: Annotated[
        Path | None,
        typer.Option(help="Draw bits against loss into this .png, .svg or .pdf file.", rich_help_panel=OUTPUT),
    ] = None,
    results: Annotated[
        Path | None,
        typer.Option(
            help="Keep each finished row in this file, and take from it what is there: a killed run goes on, one more "
            "method costs only itself.",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    json: options.Json = False,
) -> None:
    """Measure quality and memory of compression methods side by side.

    Everything runs through an engine's own cache: scored tokens read compressed history. Changes and their 95 %
    intervals (paired bootstrap over sequences) are against the same model without compression.

    [bold]Examples[/]

      minicache-trt eval -m ./checkpoint --methods kivi4,kivi2,minicache4 --text held_out.txt --plot pareto.png

      minicache-trt eval -e engine --text held_out.txt --tasks perplexity,passkey,keyvalue --lengths 1024,4096

      minicache-trt eval -m ./checkpoint --plan plan.json --text held_out.txt --length 4096 --results rows.json

      minicache-trt eval -m ./checkpoint --weights fp32,int8,int4,int4_awq --group-size 32,128 --text held_out.txt
      --calibration-text text.txt

      minicache-trt eval -e engine --tasks hellaswag,arc_easy --limit 200 --length 1024
    """
    from minicache_trt.evaluation.contenders import check_names
    from minicache_trt.evaluation.evaluate import evaluate as run
    from minicache_trt.evaluation.kept import KeptResults
    from minicache_trt.evaluation.report import summarize, tables
    from minicache_trt.evaluation.tasks import TASKS
    from minicache_trt.plots.figure import check_file

    quiet_transformers()
    settings = _settings(length, windows, examples, lengths, depths, segment, queries, seed)
    ours, harness = _tasks(tasks, include_path, limit, num_fewshot)
    if ours and text is None:
        raise UserError(f"{ours[0]} needs text", "give --text FILE, a text of the kind the model will read")
    if plot is not None:
        if not ours:
            raise UserError(f"--plot draws {', '.join(TASKS)}, and none of them is in --tasks")
        check_file(plot)
    formats = None if weights is None else options.weight_formats(weights)
    groups = None if group_size is None else options.positive_numbers("--group-size", group_size)
    computed = WeightOptions(calibration_text, calibration_samples, threads)
    chosen = Chosen(_names(methods), tuple(plan or ()), merge_start, formats, groups, computed, batch_size, backend)
    contenders = contenders_of(engine, model, revision, chosen, settings)
    check_names(contenders)
    cells = _cells(contenders, ours, text, settings)
    kept = None if results is None else KeptResults(results, cells, {"backend": backend, **_harness_data(harness)})
    with progress_bars(not json) as report:
        summary = summarize(run(contenders, cells, harness, threads, backend, report, kept))
    source = str(engine or model)
    if plot is not None:
        from minicache_trt.evaluation.plots import draw_pareto

        draw_pareto(summary, plot, f"{Path(source).resolve().name}: bits against loss")
    if json:
        asked = {"text": None if text is None else str(text), "tasks": [*ours, *(harness.names if harness else ())]}
        print_json({"model": source, **asked, **asdict(settings), "tools": tool_versions(), "methods": summary})
        return
    for rows in tables(summary, source):
        stdout.print(rows)
    if plot is not None:
        stderr.print(f"wrote {plot}")


def _names(text: str | None) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name.strip() for name in (text or "").split(",") if name.strip()))


def _settings(
    length: int, windows: int, examples: int, lengths: str | None, depths: str, segment: int, queries: int, seed: int
) -> Settings:
    from minicache_trt.evaluation.tasks import Settings

    def numbers(flag: str, words: tuple[str, ...], kind: type) -> tuple[Any, ...]:
        try:
            return tuple(kind(word) for word in words)
        except ValueError as error:
            raise UserError(f"{flag}: expected numbers separated by commas, got {','.join(words)!r}") from error

    all_lengths, all_depths = numbers("--lengths", _names(lengths), int), numbers("--depths", _names(depths), float)
    try:
        return Settings(length, windows, examples, all_lengths, all_depths, segment, queries, seed)
    except ValueError as error:
        raise UserError(f"--{error}") from error


def _tasks(
    names: str, include_path: Path | None, limit: int | None, num_fewshot: int | None
) -> tuple[list[str], HarnessTasks | None]:
    from minicache_trt.evaluation.harness import HarnessTasks
    from minicache_trt.evaluation.tasks import TASKS, split_names

    ours, others = split_names(_names(names))
    if not ours and not others:
        raise UserError("--tasks names no task", f"tasks: {', '.join(TASKS)}")
    if others:
        return ours, HarnessTasks(tuple(others), include_path, limit, num_fewshot)
    given = {"--include-path": include_path, "--limit": limit, "--num-fewshot": num_fewshot}
    needless = [name for name, value in given.items() if value is not None]
    if needless:
        raise UserError(f"{', '.join(needless)} only goes with tasks of lm-eval-harness", "name one in --tasks")
    return ours, None


def _harness_data(tasks: HarnessTasks | None) -> dict[str, Any]:
    """What results of lm-eval-harness depend on: names, limits, and the task files that were given."""
    if tasks is None:
        return {}
    folder = tasks.include_path
    files = [] if folder is None else [
        (path.name, hashlib.sha256(path.read_bytes()).hexdigest())
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    ]  # fmt: skip
    return {"tasks": tasks.names, "limit": tasks.limit, "num_fewshot": tasks.num_fewshot, "files": files}


def _cells(contenders: list[Contender], tasks: list[str], text: Path | None, settings: Settings) -> dict[str, Any]:
    """Examples, made with the checkpoint's tokenizer before any engine runs."""
    from minicache_trt.evaluation.contenders import no_tokenizer
    from minicache_trt.evaluation.scoring import exact_prefix
    from minicache_trt.evaluation.tasks import make_cells
    from minicache_trt.evaluation.text import TokenizedText, read_documents
    from minicache_trt.runtime.tokenizer import load_tokenizer

    checkpoint = contenders[0].source
    tokenizer = load_tokenizer(checkpoint)
    if tokenizer is None:
        raise no_tokenizer(checkpoint)
    if text is None:
        return {}
    config = load_config(checkpoint)
    tokenized = TokenizedText(tokenizer, read_documents(text), config.vocab_size)
    # The engine that is there has the window of those built beside it.
    return make_cells(tasks, tokenized, settings, exact_prefix(contenders[0].build or BuildConfig()))


def load_config(checkpoint: Path) -> ModelConfig:
    from minicache_trt.checkpoint import resolve_config

    return resolve_config(str(checkpoint))
