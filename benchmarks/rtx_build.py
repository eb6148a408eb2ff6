"""What does building TensorRT-RTX engines take: seconds and memory, for each method?

Each build is a ``minicache-trt build`` of its own on the random 16-layer Llama, without a GPU. ``wall`` is what a user
waits for, ``CPU`` what the build computes: on a machine that does something else they differ.
"""

from __future__ import annotations

import json as json_module
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer
from common import CACHE_DIR, CacheDir, Shape, random_llama, run
from reporting import JsonFile, write_report

from minicache_trt.cli.console import stderr
from minicache_trt.compression.methods import CALIBRATED_METHODS, METHODS
from minicache_trt.units import format_bytes

SECONDS, MEMORY_FACTOR = 15.0, 4.0
"""Targets: time, and peak memory over the weights in the engine's type."""

_METER = """
import json, resource, subprocess, sys, time
start = time.perf_counter()
process = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL)
seconds = time.perf_counter() - start
usage = resource.getrusage(resource.RUSAGE_CHILDREN)
print(json.dumps([process.returncode, seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024]))
"""
"""A process starts with its parent's peak as its own: only a child of a small one can be measured."""


def measure(checkpoint: Path, method: str, dtype: str, output: Path) -> dict[str, Any]:
    """One build, in a process of its own."""
    program = "import sys; from minicache_trt.cli import main; main()"
    arguments = ["build", "-m", str(checkpoint), "--method", method, "--backend", "tensorrt-rtx", "--dtype", dtype]
    if method in CALIBRATED_METHODS:
        arguments += ["--load-format", "dummy"]
    command = [sys.executable, "-c", program, *arguments, "--output", str(output), "--json"]
    metered = [sys.executable, "-I", "-S", "-c", _METER, *command]
    done = subprocess.run(metered, capture_output=True, text=True, check=True)
    code, seconds, cpu, peak = json_module.loads(done.stdout)
    if code:
        raise RuntimeError(f"building {method} in {dtype} failed: {done.stderr[-2000:]}")
    sizes = {path.name: path.stat().st_size for path in output.glob("*.engine")}
    return {
        "method": method,
        "dtype": dtype,
        "seconds": seconds,
        "cpu_seconds": cpu,
        "peak_bytes": peak,
        "engines": sizes,
    }


def main(
    methods: Annotated[str, typer.Option(help="Methods, comma-separated.")] = ",".join(METHODS),
    dtypes: Annotated[str, typer.Option(help="Compute types, comma-separated.")] = "float16",
    cache_dir: CacheDir = CACHE_DIR,
    json: JsonFile = None,
) -> None:
    """Print what building costs."""
    checkpoint = random_llama(cache_dir, Shape())
    weights = {"float32": 4, "float16": 2, "bfloat16": 2}
    count = (checkpoint / "model.safetensors").stat().st_size // 4
    rows: list[list[object]] = []
    results: list[dict[str, Any]] = []
    for dtype in dtypes.split(","):
        for method in methods.split(","):
            with tempfile.TemporaryDirectory() as temporary:
                result = measure(checkpoint, method, dtype, Path(temporary) / "engine")
            result["weight_bytes"] = count * weights[dtype]
            factor = result["peak_bytes"] / result["weight_bytes"]
            met = result["seconds"] <= SECONDS and factor <= MEMORY_FACTOR
            rows.append(
                [
                    f"{method}, {dtype}",
                    f"{result['seconds']:.1f} s",
                    f"{result['cpu_seconds']:.1f} s",
                    f"{format_bytes(result['peak_bytes'])}, {factor:.2f}x",
                    format_bytes(sum(result["engines"].values())),
                    "yes" if met else "no",
                ]
            )
            stderr.print("  ".join(map(str, rows[-1])))
            results.append(result)
    targets = ["target", f"< {SECONDS:.0f} s", "", f"< {MEMORY_FACTOR:.0f}x the weights", "", ""]
    columns = ("engine", "wall", "CPU", "peak memory", "engine files", "within targets")
    write_report("Building TensorRT-RTX engines of a random 16-layer Llama", columns, [*rows, targets], results, json)


if __name__ == "__main__":
    run(main)
