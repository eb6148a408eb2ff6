"""What building an engine with TensorRT takes, before it starts.

The factors were measured with TensorRT-RTX 1.7 (``benchmarks/rtx_build.py``): peak memory is a constant for the
libraries and the networks, and a multiple of the weights, of which the builder holds more than one copy. Building with
``tensorrt`` on a GPU has not been measured; the same factors are assumed.
"""

from __future__ import annotations

import math
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from minicache_trt.checkpoint.binding import weight_shapes
from minicache_trt.checkpoint.weights import ITEM_SIZES
from minicache_trt.config import BuildConfig, ModelConfig
from minicache_trt.errors import UserError
from minicache_trt.units import format_bytes

BASE_BYTES = 700 << 20
"""Memory beside the weights: libraries and networks."""
MEMORY_FACTOR = 3.0
"""Peak memory per byte of weights, in the engine's type."""
ENGINE_FACTOR = 1.03
"""Size of the engine files per byte of weights."""
ENGINE_BASE_BYTES = 40 << 20


@dataclass(frozen=True)
class BuildNeeds:
    """``weight_bytes``: of all weights in the engine's type. ``memory_bytes``: peak. ``disk_bytes``: peak, cast weights
    included."""

    weight_bytes: int
    memory_bytes: int
    disk_bytes: int


def build_needs(config: ModelConfig, build: BuildConfig) -> BuildNeeds:
    """Estimate for a model whose checkpoint is of ``config.dtype``."""
    count = sum(math.prod(shape) for shape in weight_shapes(config).values())
    weights = count * ITEM_SIZES[build.dtype]
    engine = int(weights * ENGINE_FACTOR) + ENGINE_BASE_BYTES
    cast = 0 if config.dtype == build.dtype else weights
    return BuildNeeds(weights, int(BASE_BYTES + MEMORY_FACTOR * weights), engine + cast)


def available_memory() -> int:
    """Bytes this process may still take: of the machine, or of its control group."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError):
        available = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
    except (OSError, ValueError):  # no control group, or "max"
        return available
    return min(available, max(0, limit - used))


def check_build(config: ModelConfig, build: BuildConfig, directory: Path) -> None:
    """Refuse a build that cannot fit.

    Parameters
    ----------
    config : ModelConfig
    build : BuildConfig
        With a compute type.
    directory : Path
        Where the engine directory is to be; it need not exist.

    Raises
    ------
    UserError
        The machine has too little memory, or the disk too little space.
    """
    needs = build_needs(config, build)
    memory = available_memory()
    what = f"building with {build.backend} in {build.dtype}"
    if needs.memory_bytes > memory:
        raise UserError(
            f"{what} needs about {format_bytes(needs.memory_bytes)} of memory ({format_bytes(needs.weight_bytes)} of "
            f"weights), this machine has {format_bytes(memory)} free",
            "build on a machine with more memory: a TensorRT-RTX engine is built without a GPU",
        )
    existing = next(path for path in (directory, *directory.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if needs.disk_bytes > free:
        raise UserError(
            f"{what} needs about {format_bytes(needs.disk_bytes)} of disk, {existing} has {format_bytes(free)} free",
            "free some space, or choose another --output",
        )
