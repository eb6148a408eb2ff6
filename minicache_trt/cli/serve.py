"""``minicache-trt serve``: an OpenAI-compatible HTTP server."""

from __future__ import annotations

import gc
import importlib.util
import tempfile
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from minicache_trt.cli import options
from minicache_trt.cli.console import quiet_transformers, stderr
from minicache_trt.compression.plan import CompressionPlan
from minicache_trt.config import BuildConfig, KvCacheConfig, ModelConfig
from minicache_trt.errors import UserError
from minicache_trt.units import parse_bytes

if TYPE_CHECKING:
    from minicache_trt.serving.app import HttpConfig
    from minicache_trt.serving.service import Service

NETWORK, LIMITS, MODEL, AUDIT = "Network", "Limits", "A model that is not built yet", "Audit"


def serve(
    directory: Annotated[Path | None, typer.Argument(metavar="[ENGINE]", help="Engine directory.")] = None,
    engine: Annotated[Path | None, typer.Option("--engine", "-e", help="The same, as an option.")] = None,
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help="Preset, hub id or checkpoint, built first.", rich_help_panel=MODEL),
    ] = None,
    method: options.Method = None,
    plan: options.PlanFile = None,
    max_batch_size: Annotated[int, typer.Option(help="Sequences in one step.", rich_help_panel=MODEL)] = 8,
    max_seq_len: Annotated[
        int | None, typer.Option(help="Prompt plus generated tokens.", rich_help_panel=MODEL)
    ] = None,
    max_num_tokens: Annotated[int, typer.Option(help="Tokens in one step.", rich_help_panel=MODEL)] = 2048,
    load_format: Annotated[str, typer.Option(help="auto, or dummy.", rich_help_panel=MODEL)] = "auto",
    host: Annotated[str, typer.Option(help="Address to listen on.", rich_help_panel=NETWORK)] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.", rich_help_panel=NETWORK)] = 8000,
    served_model_name: Annotated[
        list[str] | None,
        typer.Option(
            help="Name to answer to, may be given several times.",
            show_default="the directory's",
            rich_help_panel=NETWORK,
        ),
    ] = None,
    api_key: Annotated[
        list[str] | None,
        typer.Option(
            envvar="MINICACHE_API_KEY",
            help="Key clients must send; may be given several times.",
            rich_help_panel=NETWORK,
        ),
    ] = None,
    chat_template: Annotated[
        str | None, typer.Option(help="Jinja file or template instead of the tokenizer's.", rich_help_panel=NETWORK)
    ] = None,
    access_log: Annotated[
        bool, typer.Option("--access-log", help="Print a line for every request.", rich_help_panel=NETWORK)
    ] = False,
    max_queue_size: Annotated[
        int, typer.Option(min=0, help="Sequences that may wait; more are refused.", rich_help_panel=LIMITS)
    ] = 256,
    max_body_size: Annotated[str, typer.Option(help="Largest request body.", rich_help_panel=LIMITS)] = "8MiB",
    drain_timeout: Annotated[
        float, typer.Option(min=0, help="Seconds running requests have after SIGTERM.", rich_help_panel=LIMITS)
    ] = 30.0,
    kv_cache_memory: options.CacheMemory = None,
    gpu_fraction: options.GpuFraction = None,
    audit_rate: Annotated[
        float,
        typer.Option(
            min=0, max=1, help="Share of requests compared with an uncompressed engine.", rich_help_panel=AUDIT
        ),
    ] = 0.0,
    threads: options.Threads = None,
    backend: options.Backend = None,
) -> None:
    """Serve an engine over HTTP with OpenAI's interface.

    [bold]Examples[/]

      minicache-trt serve engine --port 8000

      minicache-trt serve --model ./checkpoint --method kivi4 --served-model-name my-model

      minicache-trt serve engine --api-key SECRET --audit-rate 0.05 --max-queue-size 64
    """
    check_extra()
    source = _source(directory, engine, model)
    if model is None and (method is not None or plan is not None):
        raise UserError("--method and --plan are for a --model that is built first; an engine has its plan already")
    from minicache_trt.serving.app import create_app
    from minicache_trt.serving.history import History
    from minicache_trt.serving.server import Server, bind

    cache = options.cache_config(kv_cache_memory, gpu_fraction)
    http = _http_config(api_key, max_body_size, chat_template)
    names = tuple(served_model_name or [Path(source).resolve().name if model is None else source.rstrip("/")])
    with tempfile.TemporaryDirectory(prefix="minicache-trt-") as work, bind(host, port) as listener:
        quiet_transformers()
        with stderr.status(Text(f"loading {source}")):
            limits = (max_batch_size, max_seq_len, max_num_tokens)
            build = partial(_build, source, Path(work), method, plan, limits, load_format)
            path = Path(source) if model is None else build()
            service = _service(path, Path(work), names, cache, max_queue_size, audit_rate, threads, backend)
        history = History(service)
        server = Server(create_app(service, http, history), service, history, drain_timeout, access_log)
        listener.listen(2048)
        address = f"http://{'[' + host + ']' if ':' in host else host}:{listener.getsockname()[1]}"
        typer.echo(f"{names[0]} is served at {address}/v1, status page {address}/")
        server.run(sockets=[listener])


def check_extra() -> None:
    """Raises `UserError` when the packages of the extra ``serve`` are not installed."""
    missing = [name for name in ("fastapi", "uvicorn", "prometheus_client") if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"serving needs packages that are not installed: {', '.join(missing)}",
            "install them: pip install 'minicache-trt[serve]'",
        )


def _source(directory: Path | None, engine: Path | None, model: str | None) -> str:
    given = [str(item) for item in (directory, engine, model) if item is not None]
    if len(given) != 1:
        raise UserError(
            f"expected one model to serve, got {len(given)}", "give an engine directory, or --model PRESET|HUB_ID|PATH"
        )
    return given[0]


def _http_config(api_keys: list[str] | None, max_body_size: str, chat_template: str | None) -> HttpConfig:
    from minicache_trt.serving.app import HttpConfig
    from minicache_trt.serving.chat_template import read_template

    try:
        size = parse_bytes(max_body_size, "--max-body-size")
        return HttpConfig(tuple(api_keys or ()), size, read_template(chat_template))
    except (ValueError, OverflowError) as error:
        raise UserError(f"--{str(error).replace('_', '-')}") from error


def _build(
    source: str,
    work_dir: Path,
    method: str | None,
    plan: Path | None,
    limits: tuple[int, int | None, int],
    load_format: str,
) -> Path:
    """A new engine below ``work_dir``."""
    from minicache_trt.build import build_engine, default_max_seq_len

    plan_options = options.PlanOptions(method, None, plan, None, None, None, None, None)
    options.check_calibration_text(None, method, plan, load_format, ())
    max_batch_size, max_seq_len, max_num_tokens = limits

    def configure(config: ModelConfig) -> tuple[CompressionPlan, BuildConfig]:
        length = default_max_seq_len(config) if max_seq_len is None else max_seq_len
        try:
            return plan_options(config), BuildConfig(max_batch_size, length, max_num_tokens)
        except ValueError as error:
            raise UserError(str(error)) from error

    return build_engine(source, work_dir / "engine", configure, load_format=load_format).directory


def _service(
    path: Path,
    work_dir: Path,
    names: tuple[str, ...],
    cache: KvCacheConfig,
    max_queue_size: int,
    audit_rate: float,
    threads: int | None,
    backend: str | None,
) -> Service:
    from minicache_trt.build import load_engine
    from minicache_trt.engine_directory import CHECKPOINT
    from minicache_trt.runtime.llm import LLM
    from minicache_trt.serving.service import Service
    from minicache_trt.serving.uncompressed import uncompressed_runner

    engine = load_engine(path, threads, backend)
    llm = LLM.from_engine(engine, tokenizer=path / CHECKPOINT, kv_cache_config=cache)
    uncompressed = uncompressed_runner(engine, path, work_dir, threads) if audit_rate > 0 else None
    service = Service(llm, names, max_queue_size, audit_rate, uncompressed)
    # What is loaded stays: the garbage collector need not look through it between tokens.
    gc.collect()
    gc.freeze()
    return service
