"""Backends that need what this machine may lack, and their options."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from minicache_trt.kernels.library import KernelLibrary
from minicache_trt.kernels.locate import LIBRARY_VARIABLE
from tests.cli.command import Invoke

Refused = Callable[..., None]
VERBS = [["run", "-p", "the cat"], ["compare", "-p", "the cat"], ["bench", "--batch-sizes", "1", "--contexts", "16"]]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("arguments", VERBS, ids=lambda words: words[0])
def test_cuda_without_a_gpu(refused: Refused, engine: Path, arguments: list[object]) -> None:
    refused([*arguments, "-e", engine, "--backend", "cuda"], "backend cuda needs an NVIDIA GPU", "onnxruntime")


def test_cuda_without_its_library(refused: Refused, engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(LIBRARY_VARIABLE, str(engine))
    monkeypatch.setattr("minicache_trt.kernels.locate._BUILD", engine)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for capability, parts in (((7, 5), ["8.0 or later, got 7.5"]), ((9, 0), ["not built", "build_plugins.sh --cuda"])):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda capability=capability: capability)
        refused(["run", "-p", "the cat", "-e", engine, "--backend", "cuda"], *parts)


def test_a_library_without_code_for_this_gpu(
    refused: Refused, engine: Path, host_library: KernelLibrary, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 9))
    monkeypatch.setattr("minicache_trt.backends.torch_kernels.open_library", lambda kind: host_library)
    refused(["run", "-p", "the cat", "-e", engine, "--backend", "cuda"], "has no code for this GPU, sm_89")


def test_a_wrong_variable_is_named(refused: Refused, engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(LIBRARY_VARIABLE, "absent.so")
    refused(["run", "-p", "the cat", "-e", engine, "--backend", "host-kernels"], LIBRARY_VARIABLE, "absent.so")


@pytest.mark.parametrize("share", ["0", "1", "-3", "nan"])
def test_share_of_gpu_memory_out_of_range(refused: Refused, engine: Path, share: str) -> None:
    flags = ["--kv-cache-free-gpu-memory-fraction", share]
    for arguments in VERBS:
        refused([*arguments, "-e", engine, *flags], "--kv-cache-free-gpu-memory-fraction", "between 0 and 1")


def test_doctor_tells_of_kernels(
    invoke: Invoke, host_library: KernelLibrary, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("minicache_trt.kernels.locate._BUILD", tmp_path)
    monkeypatch.setenv(LIBRARY_VARIABLE, str(host_library.path))
    result = invoke("doctor", "--json")
    checks = {check["name"]: check for check in json.loads(result.out)}
    assert checks["host kernels"]["ok"] and checks["host kernels"]["found"].startswith("0.1.0 host")
    assert not checks["cuda kernels"]["ok"] and "build_plugins.sh" in checks["cuda kernels"]["remedy"]
    assert "nvcc" in checks and not any(checks[name]["needed"] for name in ("nvcc", "cuda kernels", "host kernels"))
    assert result.code == 0
