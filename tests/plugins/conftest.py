"""The plugin library and the harness, built from the headers of TensorRT that are at hand; without them, a skip."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from minicache_trt.kernels.library import KernelLibrary
from tests.gpu.conftest import Kernels
from tests.support.plugin_build import HOST_OUTPUT, built_plugins
from tests.support.plugin_harness import Harness


@pytest.fixture(scope="session")
def host_plugins() -> Path:
    """Folder of the host variant and of the harness."""
    return built_plugins("--host", output=HOST_OUTPUT)


@pytest.fixture(scope="session")
def harness(host_plugins: Path) -> Harness:
    """The host variant of the plugins, driven through TensorRT's interfaces."""
    return Harness(host_plugins / "libminicache_trt_harness.so", host_plugins / "libminicache_trt_plugins_host.so")


@pytest.fixture(scope="session")
def kernels(harness: Harness) -> Kernels:
    """The kernels inside the plugin library, by their own C ABI."""
    return Kernels(KernelLibrary(harness.library), torch.device("cpu"), "host")
