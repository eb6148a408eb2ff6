"""What a program takes that writes a directory: seconds, memory, disk."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Cost:
    """One run: wall-clock time, peak resident memory, bytes on disk beyond the checkpoint it links to, CPU time."""

    seconds: float
    peak_bytes: int
    added_bytes: int
    cpu_seconds: float


def disk_bytes(directory: Path, beside: Path | None) -> int:
    """Bytes of disk a directory takes, without files it shares with another."""
    shared = {path.stat().st_ino for path in beside.rglob("*")} if beside else set()
    stats = [path.stat() for path in directory.rglob("*") if path.is_file()]
    return sum(stat.st_blocks * 512 for stat in stats if stat.st_ino not in shared)


_METER = """
import json, resource, subprocess, sys, time
start = time.perf_counter()
code = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL).returncode
seconds = time.perf_counter() - start
usage = resource.getrusage(resource.RUSAGE_CHILDREN)
print(json.dumps([code, seconds, usage.ru_maxrss, usage.ru_utime + usage.ru_stime]))
"""
"""A process starts with its parent's peak as its own: only a child of a small one can be measured."""


def cost_of(command: Sequence[str], output: Path, checkpoint: Path | None) -> Cost:
    """Run a command that writes ``output`` and measure it; what it prints is shown only when it fails.

    Raises
    ------
    RuntimeError
        The command failed.
    """
    metered = [sys.executable, "-I", "-S", "-c", _METER, *command]
    process = subprocess.run(metered, capture_output=True, text=True, check=True)
    code, seconds, peak, cpu = json.loads(process.stdout)
    if code:
        raise RuntimeError(f"{' '.join(command)} ended with status {code}: {process.stderr[-2000:]}")
    # Linux counts in KiB, macOS in bytes.
    return Cost(seconds, peak * (1 if sys.platform == "darwin" else 1024), disk_bytes(output, checkpoint), cpu)


def build_cost(arguments: Sequence[str], output: Path, checkpoint: Path | None) -> Cost:
    """Run ``minicache-trt build`` and measure it; see `cost_of`."""
    return cost_of(build_command(arguments, output), output, checkpoint)


def build_command(arguments: Sequence[str], output: Path) -> list[str]:
    """``minicache-trt build``, as installed."""
    program = shutil.which("minicache-trt", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if program is None:
        raise RuntimeError("minicache-trt is not installed: pip install -e .")
    return [program, "build", *arguments, "--output", str(output), "--json"]
