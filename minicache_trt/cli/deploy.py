"""``minicache-trt deploy``: engines for servers of others."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from minicache_trt.cli import options
from minicache_trt.cli.console import print_json, stderr, stdout
from minicache_trt.errors import UserError

deploy = typer.Typer(no_args_is_help=True, help="Put an engine where another server finds it.")

SERVING = "Serving"
PYTHON = "Python"


@deploy.callback()
def root() -> None:
    """Put an engine where another server finds it."""


@deploy.command(no_args_is_help=True)
def triton(
    engine: options.EngineDir,
    output: Annotated[
        Path, typer.Option("--output", "-o", "--model-repository", help="Model repository; created if need be.")
    ],
    model_name: Annotated[str, typer.Option(help="Name clients use.")] = "minicache",
    version: Annotated[int, typer.Option(help="Triton serves the highest version.")] = 1,
    copy: Annotated[
        bool, typer.Option("--copy/--link", help="Copy the engine's files, or hard-link them (no space needed).")
    ] = False,
    instance_count: Annotated[
        int, typer.Option(help="Instances, on each GPU; each has its own cache.", rich_help_panel=SERVING)
    ] = 1,
    gpus: Annotated[
        str | None, typer.Option(help="GPUs to run on, such as 0,1.", show_default="CPU", rich_help_panel=SERVING)
    ] = None,
    max_queue_size: Annotated[
        int, typer.Option(help="Requests that may wait; 0 is any number.", rich_help_panel=SERVING)
    ] = 0,
    max_batch_size: Annotated[
        int,
        typer.Option(
            help="0: tensors without a batch dimension; else a first dimension of at most so many rows.",
            rich_help_panel=SERVING,
        ),
    ] = 0,
    decoupled: Annotated[
        bool, typer.Option(help="Stream; otherwise one response for each request.", rich_help_panel=SERVING)
    ] = True,
    accumulate_tokens: Annotated[
        bool, typer.Option("--accumulate-tokens", help="Stream all text so far each time.", rich_help_panel=SERVING)
    ] = False,
    kv_cache_memory: options.CacheMemory = None,
    gpu_fraction: options.GpuFraction = None,
    threads: options.Threads = None,
    backend: options.Backend = None,
    python_path: Annotated[
        list[Path] | None,
        typer.Option(help="Where the server finds packages first; may be given several times.", rich_help_panel=PYTHON),
    ] = None,
    environment: Annotated[
        bool, typer.Option(help="Add the environment of this command to it.", rich_help_panel=PYTHON)
    ] = True,
    execution_env: Annotated[
        str | None, typer.Option(help="Triton's EXECUTION_ENV_PATH.", rich_help_panel=PYTHON)
    ] = None,
    force: Annotated[bool, typer.Option("--force", "-f", help="Replace this version.")] = False,
    json: options.Json = False,
) -> None:
    """Write a model repository for Triton Inference Server: Python backend, streaming, TensorRT-LLM's tensors.

    [bold]Examples[/]

      minicache-trt deploy triton -e engine -o repository

      minicache-trt deploy triton -e engine -o repository --gpus 0,1 --max-queue-size 256 --kv-cache-memory 40GiB

      minicache-trt deploy triton -e better-engine -o repository --version 2
    """
    from minicache_trt.backends import BACKENDS
    from minicache_trt.serving.triton.repository import deploy, this_environment
    from minicache_trt.serving.triton.settings import InstanceSettings, ModelSettings

    if backend is not None and backend not in BACKENDS:
        raise UserError(f"unknown --backend {backend!r}", f"backends: {', '.join(BACKENDS)}")
    folders = tuple(path.resolve() for path in python_path or ()) + (this_environment() if environment else ())
    try:
        instance = InstanceSettings(
            max_queue_size=max_queue_size,
            kv_cache=options.cache_config(kv_cache_memory, gpu_fraction),
            backend=backend,
            num_threads=threads,
            accumulate_tokens=accumulate_tokens,
            execution_env=execution_env,
        )
        settings = ModelSettings(
            model_name, instance, instance_count, None if gpus is None else _devices(gpus), max_batch_size, decoupled
        )
    except ValueError as error:
        raise UserError(str(error)) from error
    result = deploy(engine, output, settings, version, packages=folders, copy=copy, overwrite=force)
    if json:
        summary = {"model": model_name, "version": version, "directory": str(result.directory)}
        print_json({**summary, "linked": result.linked, "config_changed": result.config_changed})
        return
    if not (result.linked or copy):
        stderr.print("note: the engine was copied, because the repository is on another file system")
    if result.config_changed:
        stderr.print("note: config.pbtxt has changed; a running server loads every version it serves again")
    stdout.print(f"version {version} of {model_name} is in {output}", soft_wrap=True)
    stdout.print(f"tritonserver --model-repository={output.absolute()}", soft_wrap=True)


def _devices(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise UserError(f"--gpus: expected numbers such as 0,1, got {text!r}") from None
