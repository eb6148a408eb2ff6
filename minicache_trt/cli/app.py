"""All verbs."""

from __future__ import annotations

from typing import Annotated

import typer

from minicache_trt.cli import bench, build, compare, doctor, inspect, models, plan, run, serve
from minicache_trt.cli.console import stdout
from minicache_trt.cli.deploy import deploy

app = typer.Typer(
    name="minicache-trt",
    help="Build, run and prove LLM engines with a cross-layer compressed, paged KV cache.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={
        "help_option_names": ["-h", "--help"],
        # --max_seq_len is --max-seq-len: users come from tools with either style.
        "token_normalize_func": lambda token: token.replace("_", "-"),
    },
)


def _version(value: bool) -> None:
    if value:
        from importlib.metadata import version

        stdout.print(f"minicache-trt {version('minicache-trt')}")
        raise typer.Exit()


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """Build, run and prove LLM engines with a cross-layer compressed, paged KV cache."""


NEED_NOTHING = (models.models, doctor.doctor)
"""Verbs that do something without any option."""

VERBS = (
    build.build,
    run.run,
    serve.serve,
    compare.compare,
    bench.bench,
    models.models,
    plan.plan,
    inspect.inspect,
    doctor.doctor,
)

for verb in VERBS:
    app.command(no_args_is_help=verb not in NEED_NOTHING)(verb)

app.add_typer(deploy, name="deploy")
