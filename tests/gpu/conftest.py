"""What tests of the CUDA kernels need: a GPU and the library built for it, or nvcc and a GPU emulated on the CPU.

The emulated one runs the PTX that nvcc makes of the kernels, through the same launchers, and reports races, addresses
outside of every tensor and lanes that wait for ever. ``MINICACHE_TEST_KERNELS`` chooses: ``cuda``, ``emulated``, or
``host``, which takes the host build, to try the tests themselves.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch

from minicache_trt.kernels.emulated import EmulatedRuntime
from minicache_trt.kernels.library import KernelLibrary
from minicache_trt.kernels.locate import LIBRARY_VARIABLE
from tests.support.emulator import only_tensors
from tests.support.plugin_build import EMULATED_OUTPUT, NVCC, build_plugins, gpu_plugins


def kind_of_kernels() -> str:
    """Which library the tests run: the best this machine has, if nobody chose."""
    available = "cuda" if torch.cuda.is_available() else "emulated" if NVCC is not None else "none"
    return os.environ.get("MINICACHE_TEST_KERNELS", available)


@dataclass(frozen=True)
class Kernels:
    """A library and the device its tensors lie on."""

    library: KernelLibrary
    device: torch.device
    kind: str

    @property
    def on_gpu(self) -> bool:
        return self.kind == "cuda"

    def poison_free_memory(self) -> None:
        """Fill memory that the next allocations get with NaN."""
        torch.full((1 << 22,), torch.nan, device=self.device)


@pytest.fixture(scope="session", params=[kind_of_kernels()])
def kernels(request: pytest.FixtureRequest) -> Kernels:
    kind = str(request.param)
    if kind == "none":
        pytest.skip("needs an NVIDIA GPU, and PyTorch finds none, or nvcc, to emulate one")
    if kind == "host":
        return Kernels(request.getfixturevalue("host_library"), torch.device("cpu"), kind)
    if kind == "emulated":
        folder, device = build_plugins("--emulated", output=EMULATED_OUTPUT), torch.device("cpu")
    else:
        folder, device = gpu_plugins(), torch.device("cuda", torch.cuda.current_device())
    return Kernels(KernelLibrary(folder / f"libminicache_{kind}.so"), device, kind)


@pytest.fixture(autouse=True)
def emulated_memory(kernels: Kernels, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """On an emulated GPU, kernels may use the memory of tensors whose address they were given, and no other."""
    if kernels.kind != "emulated":
        yield
        return
    with only_tensors(EmulatedRuntime(kernels.library.path), monkeypatch):
        yield


@pytest.fixture
def named_library(kernels: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    """Backends opened by name find the library of these tests."""
    monkeypatch.setenv(LIBRARY_VARIABLE, str(kernels.library.path))
