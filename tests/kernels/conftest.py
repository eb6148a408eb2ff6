"""The host build of the kernels; the script that makes it lets one process at a time work on a folder."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from minicache_trt.kernels.library import KernelLibrary

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def host_library() -> KernelLibrary:
    output = ROOT / "build" / "plugins-host"
    script = ROOT / "build_scripts" / "build_plugins.sh"
    subprocess.run([script, "--host", "--output", output], check=True, capture_output=True)
    return KernelLibrary(output / "libminicache_host.so")
