"""What a program takes that writes a directory: seconds, memory, disk."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Cost:
    """One run: wall-clock time, peak resident memory, bytes on disk beyond the checkpoint it links to."""

    seconds: float
    peak_bytes: int
    added_bytes: int


def disk_bytes(directory: Path, beside: Path | None) -> int:
    """Bytes of disk a directory takes, without files it shares with another."""
    shared = {path.stat().st_ino for path in beside.rglob("*")} if beside else set()
    stats = [path.stat() for path in directory.rglob("*") if path.is_file()]
    return sum(stat.st_blocks * 512 for stat in stats if stat.st_ino not in shared)


def cost_of(command: Sequence[str], output: Path, checkpoint: Path | None) -> Cost:
    """Run a command that writes ``output`` and measure it; what it prints is shown only when it fails.

    Raises
    ------
    RuntimeError
        The command failed.
    """
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    messages = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with status {process.returncode}: {messages[-2000:]}")
    # Linux counts in KiB, macOS in bytes.
    peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return Cost(seconds, peak, disk_bytes(output, checkpoint))


def build_cost(arguments: Sequence[str], output: Path, checkpoint: Path | None) -> Cost:
    """Run ``minicache-trt build`` and measure it; see `cost_of`."""
    program = shutil.which("minicache-trt", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if program is None:
        raise RuntimeError("minicache-trt is not installed: pip install -e .")
    return cost_of([program, "build", *arguments, "--output", str(output), "--json"], output, checkpoint)
