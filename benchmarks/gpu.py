"""What GPU benchmarks share: that there is a GPU, its name, times of calls, the bandwidth it copies at."""

from __future__ import annotations

import importlib.metadata
import statistics
from collections.abc import Callable
from typing import Any

import torch

from minicache_trt.errors import UserError

FLUSH_BYTES = 256 << 20
"""More than any second-level cache holds."""


def require_gpu() -> torch.device:
    """The GPU that is measured.

    Raises
    ------
    UserError
        PyTorch finds none.
    """
    if not torch.cuda.is_available():
        raise UserError("this benchmark needs an NVIDIA GPU, and PyTorch finds none", "see benchmarks/README.md")
    return torch.device("cuda", torch.cuda.current_device())


def gpu_description(device: torch.device) -> dict[str, Any]:
    """What its numbers depend on."""
    properties = torch.cuda.get_device_properties(device)
    packages = {}
    for name in ("flashinfer-python", "flash-attn"):
        try:
            packages[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            packages[name] = None
    return {
        "gpu": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "gpu_memory_gib": round(properties.total_memory / 2**30, 1),
        "multiprocessors": properties.multi_processor_count,
        "cuda": torch.version.cuda,
        **packages,
    }


def seconds(run: Callable[[], object], repeats: int = 20) -> float:
    """Median time of a call on the GPU, caches cold."""
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")
    events = []
    run()
    for _ in range(repeats):
        flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        events.append((start, end))
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in events) / 1e3


def copy_bandwidth(device: torch.device, size: int = 2 << 30) -> float:
    """Bytes per second, read and written, of a large copy on the device: the ceiling of all that is bound by memory."""
    source, target = (torch.empty(size, dtype=torch.int8, device=device) for _ in range(2))
    return 2 * size / seconds(lambda: target.copy_(source))
