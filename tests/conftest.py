"""Settings of every test process."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from minicache_trt.kernels.library import KernelLibrary

# Test processes run side by side, one per core; a second thread each would only make them wait for one another.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# No test may reach a hub.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def host_library() -> KernelLibrary:
    """The host build of the kernels; the script that makes it lets one process at a time work on a folder."""
    from minicache_trt.kernels.library import KernelLibrary

    output = ROOT / "build" / "plugins-host"
    script = ROOT / "build_scripts" / "build_plugins.sh"
    subprocess.run([script, "--host", "--output", output], check=True, capture_output=True)
    return KernelLibrary(output / "libminicache_host.so")
