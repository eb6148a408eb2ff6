"""Building the plugins in a test run."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "build_scripts" / "build_plugins.sh"
HOST_OUTPUT = ROOT / "build" / "plugins-host"
"""Shared with the fixture `host_library`: the kernels are compiled once."""


def built_plugins(*options: str, output: Path) -> Path:
    """Build with ``--tensorrt`` and return the output folder; a skip where TensorRT's headers are missing."""
    command = [SCRIPT, "--tensorrt", *options, "--output", output]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode == 2 and "headers are missing" in result.stderr:
        pytest.skip(" ".join(result.stderr.split()))
    assert result.returncode == 0, result.stdout + result.stderr
    return output
