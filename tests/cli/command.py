"""What the tests of the command line run it with, and what they expect of every refusal."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Result:
    """Exit code and output of one command."""

    code: int
    out: str
    err: str


Invoke = Callable[..., Result]
"""From the command's arguments to its result."""


def run_process(*arguments: object, **environment: str) -> Result:
    """The command in a process of its own."""
    process = subprocess.run(
        [sys.executable, "-c", "from minicache_trt.cli import main; main()", *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        timeout=120,
    )
    return Result(process.returncode, process.stdout, process.stderr)


def assert_refused(result: Result, *parts: str) -> None:
    """Exit code 2, nothing on stdout, one line of error that has all ``parts``, at most one hint (with any of them)."""
    lines = result.err.splitlines()
    assert result.code == 2, result
    assert result.out == "", result
    assert lines and lines[0].startswith("error: "), result
    assert len(lines) == 1 or (len(lines) == 2 and lines[1].startswith("hint: ")), result
    for part in parts:
        assert part in result.err, (part, result)
    assert "None" not in lines[0], result


def snapshot(directory: Path) -> dict[str, str]:
    """Every path below a directory, hidden ones too, with a digest of its content."""
    return {
        path.relative_to(directory).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        for path in directory.rglob("*")
    }
