"""``minicache-trt run``: generate text."""

from __future__ import annotations

import gc
import json as json_module
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from minicache_trt.cli import options
from minicache_trt.cli.console import print_json, quiet_transformers, stderr, stdout, table
from minicache_trt.compression.size import ratio
from minicache_trt.engine_directory import CHECKPOINT
from minicache_trt.errors import UserError
from minicache_trt.runtime.request import RequestOutput, SamplingParams
from minicache_trt.units import format_bytes

if TYPE_CHECKING:
    from minicache_trt.backends.base import Engine
    from minicache_trt.config import KvCacheConfig
    from minicache_trt.runtime.llm import LLM

SAMPLING = "Sampling"


def run(
    engine: options.EngineDir,
    prompt: options.Prompt = None,
    prompts: options.PromptFile = None,
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", "--max-output-len", min=1, help="Tokens to generate.")
    ] = 128,
    temperature: Annotated[float, typer.Option(help="0 is greedy.", rich_help_panel=SAMPLING)] = 0.0,
    top_k: Annotated[int, typer.Option(help="0 is off.", rich_help_panel=SAMPLING)] = 0,
    top_p: Annotated[float, typer.Option(rich_help_panel=SAMPLING)] = 1.0,
    min_p: Annotated[float, typer.Option(rich_help_panel=SAMPLING)] = 0.0,
    repetition_penalty: Annotated[float, typer.Option(rich_help_panel=SAMPLING)] = 1.0,
    seed: Annotated[int | None, typer.Option(rich_help_panel=SAMPLING)] = None,
    stop: Annotated[list[str] | None, typer.Option(help="Stop at this text.", rich_help_panel=SAMPLING)] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", rich_help_panel=SAMPLING)] = False,
    kv_cache_memory: options.CacheMemory = None,
    gpu_fraction: options.GpuFraction = None,
    threads: options.Threads = None,
    backend: options.Backend = None,
    tokenizer: options.TokenizerDir = None,
    json: options.Json = False,
) -> None:
    """Generate text from prompts and print speed and cache use.

    [bold]Examples[/]

      minicache-trt run -e engine -p "def main():"

      minicache-trt run -e engine --prompts prompts.txt --temperature 0.8 --seed 1 --json

      minicache-trt run -e engine -p "def main():" --backend cuda
    """
    texts = read_prompts(prompt, prompts)
    try:
        params = SamplingParams(
            max_tokens=max_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            seed=seed,
            stop=stop,
            ignore_eos=ignore_eos,
        )
    except ValueError as error:
        raise UserError(str(error)) from error
    llm = open_llm(engine, threads, backend, options.cache_config(kv_cache_memory, gpu_fraction), tokenizer)
    if len(texts) == 1 and not json:
        _stream(llm, texts[0], params)
    else:
        outputs = llm.generate(texts, params, use_tqdm=not json and stderr.is_terminal)
        if json:
            print_json({"outputs": [_output(o) for o in outputs], "statistics": usage(llm)})
        else:
            _print_texts(outputs)
        _check_finished(outputs)
    if not json:
        _print_usage(llm)


def open_llm(
    engine: Path, threads: int | None, backend: str | None, config: KvCacheConfig, tokenizer: Path | None = None
) -> LLM:
    """An engine directory, loaded, with its cache allocated and its tokenizer or another."""
    with stderr.status(Text(f"loading {engine}")):
        from minicache_trt.build import load_engine

        return text_llm(load_engine(engine, threads, backend), engine, config, tokenizer)


def text_llm(engine: Engine, directory: Path, config: KvCacheConfig, tokenizer: Path | None = None) -> LLM:
    """A loaded engine with its cache allocated and the tokenizer of its directory, or of another."""
    from minicache_trt.runtime.llm import LLM

    quiet_transformers()
    llm = LLM.from_engine(engine, tokenizer=tokenizer or directory / CHECKPOINT, kv_cache_config=config)
    if llm.tokenizer is None:
        raise UserError(
            f"{tokenizer or directory} has no tokenizer, so it takes no text",
            "give --tokenizer DIR to run, or to build, or add tokenizer.json to the checkpoint and build again",
        )
    # What is loaded stays: the garbage collector need not look through it between tokens.
    gc.collect()
    gc.freeze()
    return llm


def read_prompts(texts: list[str] | None, file: Path | None) -> list[str]:
    """Prompts from ``--prompt`` and ``--prompts``."""
    prompts = list(texts or [])
    if file is not None:
        try:
            content = file.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--prompts: cannot read {file}: {getattr(error, 'strerror', None) or error}") from error
        lines = [(number, line) for number, line in enumerate(content.split("\n"), 1) if line.strip()]
        if not lines:
            raise UserError(f"--prompts: {file} holds no prompt", "write one prompt per line")
        prompts += [_json_prompt(file, number, line) if file.suffix == ".jsonl" else line for number, line in lines]
    if not prompts:
        raise UserError("no prompt was given", "use --prompt TEXT or --prompts FILE")
    for prompt in prompts:
        if any("\ud800" <= character <= "\udfff" for character in prompt):
            raise UserError(f"prompt {prompt!a} is not valid Unicode", "encode it as UTF-8")
    return prompts


def _json_prompt(file: Path, number: int, line: str) -> str:
    try:
        value = json_module.loads(line)["prompt"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"--prompts: {file}, line {number}: expected an object with a field prompt") from error
    if not isinstance(value, str):
        raise UserError(f"--prompts: {file}, line {number}: prompt: expected text, got {value!r}")
    return value


def _stream(llm: LLM, prompt: str, params: SamplingParams) -> None:
    pieces = llm.generate_stream(prompt, params)
    sys.stdout.write(prompt)
    for piece in pieces:
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")


def _print_texts(outputs: list[RequestOutput]) -> None:
    for output in outputs:
        stdout.rule()
        sys.stdout.write(f"{output.prompt}{output.outputs[0].text}\n")
    stdout.rule()


def _check_finished(outputs: list[RequestOutput]) -> None:
    """Raises `UserError` when a request ended before its time."""
    failed = [output.outputs[0] for output in outputs if output.outputs[0].finish_reason == "error"]
    if failed:
        raise UserError(f"{len(failed)} of {len(outputs)} requests ended early: {failed[0].stop_reason}")


def _output(output: RequestOutput) -> dict[str, Any]:
    completion = output.outputs[0]
    return {
        "prompt": output.prompt,
        "text": completion.text,
        "prompt_tokens": len(output.prompt_token_ids),
        "token_ids": completion.token_ids,
        "finish_reason": completion.finish_reason,
        "stop_reason": completion.stop_reason,
    }


def usage(llm: LLM) -> dict[str, Any]:
    """Statistics of the last run and what the cache costs."""
    stats, engine = llm.statistics, llm.engine
    context = engine.build.max_seq_len
    return {
        **asdict(stats),
        "prefill_tokens_per_second": stats.prefill_tokens_per_second,
        "decode_tokens_per_second": stats.decode_tokens_per_second,
        "hit_rate": stats.hit_rate,
        "method": engine.plan.method,
        "cache_ratio_to_16_bit": ratio(engine.plan, engine.model, context, engine.build.window),
        "cache_ratio_context": context,
    }


def _print_usage(llm: LLM) -> None:
    stats, figures = llm.statistics, usage(llm)
    rows = table("Run", "what", "value")
    rows.add_row("prefill", f"{stats.prefill_tokens} tokens, {stats.prefill_tokens_per_second:.1f} tokens/s")
    rows.add_row("decode", f"{stats.decode_tokens} tokens, {stats.decode_tokens_per_second:.1f} tokens/s")
    for tier in ("full", "compressed"):
        used, allocated = figures[f"{tier}_bytes_used"], figures[f"{tier}_bytes_allocated"]
        rows.add_row(f"{tier} tier", f"{format_bytes(used)} used of {format_bytes(allocated)}")
    rows.add_row("blocks compressed", str(stats.demotions))
    if stats.hit_tokens:
        rows.add_row("prompt tokens found in the cache", f"{stats.hit_tokens} ({stats.hit_rate:.0%})")
    if stats.preemptions:
        rows.add_row("preemptions", str(stats.preemptions))
    ratio, context = figures["cache_ratio_to_16_bit"], figures["cache_ratio_context"]
    rows.add_row("cache against 16 bit", f"{ratio:.2f}x smaller at {context} tokens ({figures['method']})")
    stderr.print(rows)
