"""The host build of the kernels, made once for all test processes."""

from __future__ import annotations

import fcntl
import subprocess
from pathlib import Path

import pytest

from minicache_trt.kernels.library import KernelLibrary

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def host_library() -> KernelLibrary:
    output = ROOT / "build" / "plugins-host"
    output.mkdir(parents=True, exist_ok=True)
    with (output / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        subprocess.run(
            [ROOT / "build_scripts" / "build_plugins.sh", "--host", "--output", output], check=True, capture_output=True
        )
    return KernelLibrary(output / "libminicache_host.so")
