"""Tables, and result files that say which machine, versions and commit they come from."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import MARKDOWN
from rich.console import Console

from minicache_trt.backends.cpu_kernels import instruction_set
from minicache_trt.cli.console import table

PACKAGES = ("minicache-trt", "numpy", "onnx", "onnx-ir", "onnxruntime", "torch", "transformers")
CPU_FEATURES = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8")

JsonFile = Annotated[Path | None, typer.Option("--json", help="Also write the results to this file.")]


def machine() -> dict[str, Any]:
    """What the numbers depend on, without names that tell machines of one kind apart."""
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    lines = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in info.splitlines())}
    flags = lines.get("flags", "").split()
    try:
        system = platform.freedesktop_os_release()["PRETTY_NAME"]
    except OSError:
        system = platform.platform(terse=True)
    return {
        "cpu": lines.get("model name", platform.processor()),
        "cpu_features": [name for name in CPU_FEATURES if name in flags],
        "cores": os.cpu_count(),
        "cpu_kernels": instruction_set(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "os": system,
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "load_average": round(os.getloadavg()[0], 2),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git(*arguments: str) -> str:
    result = subprocess.run(["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    return result.stdout.strip()


def _command() -> str:
    """The command line, absolute paths reduced to their last part."""
    words = [Path(word).name if word.startswith("/") else word for word in sys.argv[1:]]
    return shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *words])


ORIGIN = {
    "command": _command(),
    "commit": _git("rev-parse", "HEAD"),
    "uncommitted_changes": bool(_git("status", "--porcelain", "--", ":/minicache_trt")),
    "machine": machine(),
}
"""Taken before anything is measured: later the sources may change, and the load average would be our own."""


def write_report(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[object]], results: object, json_file: Path | None
) -> None:
    """Print a table; write the results with everything needed to understand and repeat them.

    Parameters
    ----------
    title : str
        The question, with its unit.
    columns : sequence of str
    rows : sequence of sequences
    results : JSON value
        The same numbers, unrounded, and the samples behind them.
    json_file : Path, optional
    """
    output = table("", *columns)
    output.title, output.box = None, MARKDOWN
    for row in rows:
        output.add_row(*(f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in row))
    console = Console(width=200, highlight=False)
    console.print(title)
    console.print(output)
    if json_file is None:
        return
    data = {
        "benchmark": Path(sys.argv[0]).stem,
        "title": title,
        **ORIGIN,
        "columns": list(columns),
        "rows": [[str(cell) if not isinstance(cell, int | float) else cell for cell in row] for row in rows],
        "results": results,
    }
    json_file.parent.mkdir(parents=True, exist_ok=True)
    json_file.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
