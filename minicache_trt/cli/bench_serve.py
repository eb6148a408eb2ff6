"""``minicache-trt bench serve``: load on a server, and what it answers."""

from __future__ import annotations

import asyncio
import importlib.util
import json as json_module
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from minicache_trt.cli import options
from minicache_trt.cli.console import print_json, progress_bars, stderr, stdout
from minicache_trt.errors import UserError
from minicache_trt.load.apis import APIS, Sampling
from minicache_trt.load.loads import Sweep, all_loads
from minicache_trt.load.slo import Slo, parse_slo
from minicache_trt.load.sources import DATASETS, SourceOptions

if TYPE_CHECKING:
    from minicache_trt.load.session import Server, Session

SERVER, REQUESTS, LOAD, OUTPUT = "Server", "Requests", "Load", "Output"

Made = TypeVar("Made")


def serve(
    url: Annotated[
        str, typer.Option("--url", "--base-url", help="Root of the server.", rich_help_panel=SERVER)
    ] = "http://127.0.0.1:8000",
    api: Annotated[
        str, typer.Option("--api", "--backend", help=f"{', '.join(APIS)}.", rich_help_panel=SERVER)
    ] = "openai",
    model: Annotated[
        str | None,
        typer.Option(
            "--model", "-m", help="Its name on the server.", show_default="the first one", rich_help_panel=SERVER
        ),
    ] = None,
    endpoint: Annotated[
        str | None, typer.Option(help="Path to post to.", show_default="the API's", rich_help_panel=SERVER)
    ] = None,
    api_key: Annotated[
        str | None,
        typer.Option(help="Sent as a bearer token.", envvar="OPENAI_API_KEY", rich_help_panel=SERVER),
    ] = None,
    header: Annotated[
        list[str] | None, typer.Option(help="NAME=VALUE; may be given several times.", rich_help_panel=SERVER)
    ] = None,
    timeout: Annotated[float, typer.Option(help="Seconds a request may take.", rich_help_panel=SERVER)] = 600.0,
    dataset_name: Annotated[
        str, typer.Option("--dataset-name", "--dataset", help=f"{', '.join(DATASETS)}.", rich_help_panel=REQUESTS)
    ] = "sharegpt-like",
    dataset_path: Annotated[
        Path | None,
        typer.Option(help="ShareGPT JSON, or JSON lines of prompts, instead.", rich_help_panel=REQUESTS),
    ] = None,
    input_len: Annotated[
        int,
        typer.Option(
            "--input-len", "--random-input-len", help="Tokens of a prompt; their mean.", rich_help_panel=REQUESTS
        ),
    ] = 220,
    output_len: Annotated[
        int | None,
        typer.Option(
            "--output-len",
            "--random-output-len",
            help="Tokens of an answer; their mean.",
            show_default="200, or the file's",
            rich_help_panel=REQUESTS,
        ),
    ] = None,
    sigma: Annotated[
        float, typer.Option(help="sharegpt-like: spread of the logarithm of lengths.", rich_help_panel=REQUESTS)
    ] = 1.0,
    range_ratio: Annotated[
        float,
        typer.Option(
            "--range-ratio",
            "--random-range-ratio",
            help="random: lengths vary so much.",
            rich_help_panel=REQUESTS,
        ),
    ] = 0.0,
    prefix_len: Annotated[
        int, typer.Option(help="shared-prefix: tokens of each, before the prompt.", rich_help_panel=REQUESTS)
    ] = 1000,
    num_prefixes: Annotated[int, typer.Option(help="shared-prefix: how many.", rich_help_panel=REQUESTS)] = 1,
    max_input_len: Annotated[int, typer.Option(help="Longest prompt, in tokens.", rich_help_panel=REQUESTS)] = 1024,
    max_output_len: Annotated[int, typer.Option(help="Longest answer, in tokens.", rich_help_panel=REQUESTS)] = 1024,
    tokenizer: Annotated[
        str | None,
        typer.Option(
            help="Engine, checkpoint or hub id that cuts prompts to size.",
            show_default="as the server counts",
            rich_help_panel=REQUESTS,
        ),
    ] = None,
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="Answers of full length.", rich_help_panel=REQUESTS)
    ] = False,
    temperature: Annotated[float, typer.Option(help="0 is greedy.", rich_help_panel=REQUESTS)] = 0.0,
    extra_body: Annotated[
        str | None, typer.Option(help="JSON object, added to every request.", rich_help_panel=REQUESTS)
    ] = None,
    num_prompts: Annotated[
        int, typer.Option("--num-prompts", "--request-count", help="Requests of each point.", rich_help_panel=LOAD)
    ] = 100,
    num_warmups: Annotated[int, typer.Option(help="Requests before the first point.", rich_help_panel=LOAD)] = 4,
    request_rate: Annotated[
        str, typer.Option(help="Requests per second, or inf: all at once. A list is a sweep.", rich_help_panel=LOAD)
    ] = "inf",
    burstiness: Annotated[
        float, typer.Option(help="1: Poisson arrivals; less: bursts; more: steadier.", rich_help_panel=LOAD)
    ] = 1.0,
    max_concurrency: Annotated[
        str | None,
        typer.Option(
            "--max-concurrency",
            "--concurrency",
            help="Requests under way at a time. A list is a sweep.",
            show_default="no limit",
            rich_help_panel=LOAD,
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of prompts, lengths and arrivals.", rich_help_panel=LOAD)] = 0,
    slo: Annotated[
        list[str] | None,
        typer.Option("--slo", "--goodput", help="ttft=500ms,tpot=50ms,itl=50ms,e2el=5s.", rich_help_panel=OUTPUT),
    ] = None,
    csv: Annotated[
        Path | None, typer.Option(help="Write a row per point to this file.", rich_help_panel=OUTPUT)
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Write plots (PNG) into this directory.", rich_help_panel=OUTPUT)
    ] = None,
    detailed: Annotated[
        bool,
        typer.Option(
            "--detailed", "--save-detailed", help="Times and text of each request, in --json.", rich_help_panel=OUTPUT
        ),
    ] = False,
    json: options.Json = False,
) -> None:
    """Put load on an OpenAI-compatible or Triton server and measure throughput and latency.

    Arrivals, lengths and prompts follow from --seed; every point of a sweep has prompts of its own. The exit code is 1
    when no request succeeded.

    [bold]Examples[/]

      minicache-trt bench serve --url http://127.0.0.1:8000 --max-concurrency 1,8,64

      minicache-trt bench serve --request-rate 1,2,4 --slo ttft=500ms,itl=50ms --plot plots

      minicache-trt bench serve --dataset-path sharegpt.json --num-prompts 500 --json --detailed

      minicache-trt bench serve --api triton --url http://127.0.0.1:8000 --model ensemble
    """
    if importlib.util.find_spec("httpx") is None:
        raise UserError("bench serve needs the package httpx", "pip install 'minicache-trt[load]'")
    from minicache_trt.load.session import Server

    rates, limits = _rates(request_rate), _concurrencies(max_concurrency)
    sweep = _made(lambda: Sweep(all_loads(rates, limits, burstiness), num_prompts, num_warmups, seed))
    source = _made(
        lambda: SourceOptions(
            dataset_name, dataset_path, input_len, output_len, sigma, range_ratio, prefix_len, num_prefixes,
            max_input_len, max_output_len,
        )
    )  # fmt: skip
    sampling = Sampling(temperature, ignore_eos, seed, _object(extra_body))
    headers = _headers(header or [], api_key)
    server = _made(lambda: Server(url, api, model, endpoint, headers, timeout, sampling, tokenizer))
    objectives = parse_slo(slo or [])
    options.check_output("--csv", csv)
    options.check_output("--plot", plot)
    session = _measure(server, source, sweep, objectives, not json)
    if json:
        print_json(_to_json(session, source, sweep, objectives, detailed))
    else:
        _print(session)
    _write(session, csv, plot)
    if not any(point.ok for point in session.points):
        raise typer.Exit(1)


def _made(make: Callable[[], Made]) -> Made:
    """What the flags describe; a field that cannot be is named as the flag it comes from."""
    try:
        return make()
    except ValueError as error:
        raise UserError(f"--{str(error).replace('_', '-')}") from error


def _rates(text: str) -> list[float]:
    try:
        return [float(word) for word in text.split(",")]
    except ValueError as error:
        raise UserError(f"--request-rate: expected numbers or inf, separated by commas, got {text!r}") from error


def _concurrencies(text: str | None) -> list[int | None]:
    return [None] if text is None else list(options.positive_numbers("--max-concurrency", text))


def _object(text: str | None) -> dict[str, Any]:
    try:
        data = json_module.loads(text or "{}")
    except ValueError as error:
        raise UserError(f"--extra-body: not JSON: {error}") from error
    if not isinstance(data, dict):
        raise UserError(f"--extra-body: expected a JSON object, got {text}")
    return data


def _headers(pairs: list[str], api_key: str | None) -> dict[str, str]:
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not (name.strip() and equals):
            raise UserError(f"--header: expected NAME=VALUE, got {pair!r}")
        headers[name.strip()] = value.strip()
    if not all(text.isascii() and text.isprintable() for item in headers.items() for text in item):
        raise UserError("--header and --api-key: expected printable ASCII text")
    return headers


def _measure(server: Server, source: SourceOptions, sweep: Sweep, slo: Slo | None, show: bool) -> Session:
    from minicache_trt.load.session import measure

    with progress_bars(show) as report:
        return asyncio.run(measure(server, source, sweep, slo, report))


def _print(session: Session) -> None:
    from minicache_trt.load.report import tables

    for rows in tables(session.points):
        stdout.print(rows)
    if session.lengths == "words":
        stderr.print("The server does not count prompt tokens: lengths are a guess of 1.3 tokens a word (--tokenizer).")


def _write(session: Session, csv: Path | None, plot: Path | None) -> None:
    if csv is not None:
        from minicache_trt.load.report import write_csv

        write_csv(session.points, csv)
    if plot is not None:
        from minicache_trt.load.plots import write_plots

        write_plots(session.points, plot, f"{session.endpoint.model}, {session.source}")


def _to_json(session: Session, source: SourceOptions, sweep: Sweep, slo: Slo | None, detailed: bool) -> dict[str, Any]:
    from minicache_trt.load.report import to_json

    endpoint, sampling = session.endpoint, session.endpoint.sampling
    return {
        "url": endpoint.url,
        "api": endpoint.api.name,
        "model": endpoint.model,
        "dataset": session.source,
        "lengths": {**asdict(source), "dataset_path": source.dataset_path and str(source.dataset_path)},
        "lengths_by": session.lengths,
        "temperature": sampling.temperature,
        "ignore_eos": sampling.ignore_eos,
        "extra_body": dict(sampling.extra),
        "num_prompts": sweep.num_prompts,
        "num_warmups": sweep.num_warmups,
        "seed": sweep.seed,
        "slo_ms": None if slo is None else {name: 1000 * limit for name, limit in slo.limits},
        "points": to_json(session.points, detailed),
    }
