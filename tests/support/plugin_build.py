"""Building the plugins in a test run."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "build_scripts" / "build_plugins.sh"
HOST_OUTPUT = ROOT / "build" / "plugins-host"
"""Shared with the fixture `host_library`: the kernels are compiled once."""
EMULATED_OUTPUT = ROOT / "build" / "plugins-emulated"
"""Shared in the same way by the tests that run on an emulated GPU."""
GPU_OUTPUT = ROOT / "build" / "plugins-gpu"
"""Of the tests that run on a GPU."""
GPU_BUILD_VARIABLE = "MINICACHE_TEST_GPU_BUILD"
"""Names a folder that ``build_plugins.sh --cuda [--tensorrt]`` filled elsewhere, for a GPU machine without nvcc."""
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def run_build(*options: str, output: Path) -> subprocess.CompletedProcess[str]:
    command = [SCRIPT, *options, "--output", output]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def build_plugins(*options: str, output: Path) -> Path:
    """Build into ``output`` and return it."""
    result = run_build(*options, output=output)
    assert result.returncode == 0, result.stdout + result.stderr
    return output


def built_plugins(*options: str, output: Path) -> Path:
    """Build with ``--tensorrt`` and return the output folder; a skip where TensorRT's headers are missing."""
    result = run_build("--tensorrt", *options, output=output)
    if result.returncode == 2 and "headers are missing" in result.stderr:
        pytest.skip(" ".join(result.stderr.split()))
    assert result.returncode == 0, result.stdout + result.stderr
    return output


def gpu_plugins(tensorrt: bool = False) -> Path:
    """The folder of kernels for this machine's GPU; a skip where it should have TensorRT's plugins and cannot."""
    made = os.environ.get(GPU_BUILD_VARIABLE)
    if made is None:
        build = built_plugins if tensorrt else build_plugins
        return build("--cuda", "--arch", "native", output=GPU_OUTPUT)
    if tensorrt and not (Path(made) / "libminicache_trt_harness.so").exists():
        pytest.skip(f"{made} was built without --tensorrt")
    return Path(made)
