"""What tests of the CUDA kernels need: a GPU, and the library built for it.

``MINICACHE_TEST_KERNELS=host`` runs them on the host build instead, to try the tests themselves where there is no GPU.
"""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from minicache_trt.kernels.library import KernelLibrary
from minicache_trt.kernels.locate import LIBRARY_VARIABLE

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Kernels:
    """A library and the device its tensors lie on."""

    library: KernelLibrary
    device: torch.device

    @property
    def on_host(self) -> bool:
        return self.device.type == "cpu"

    def poison_free_memory(self) -> None:
        """Fill memory that the next allocations get with NaN."""
        torch.full((1 << 22,), torch.nan, device=self.device)


@pytest.fixture(scope="session")
def kernels(request: pytest.FixtureRequest) -> Kernels:
    if os.environ.get("MINICACHE_TEST_KERNELS") == "host":
        return Kernels(request.getfixturevalue("host_library"), torch.device("cpu"))
    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU, and PyTorch finds none")
    output = ROOT / "build" / "plugins-gpu"
    script = ROOT / "build_scripts" / "build_plugins.sh"
    subprocess.run([script, "--cuda", "--arch", "native", "--output", output], check=True, capture_output=True)
    return Kernels(KernelLibrary(output / "libminicache_cuda.so"), torch.device("cuda", torch.cuda.current_device()))


@pytest.fixture
def named_library(kernels: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    """Backends opened by name find the library of these tests."""
    monkeypatch.setenv(LIBRARY_VARIABLE, str(kernels.library.path))
