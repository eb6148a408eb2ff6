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

from minicache_trt.checkpoint.binding import linear_weights, weight_shapes
from minicache_trt.checkpoint.weights import ITEM_SIZES
from minicache_trt.config import TENSORRT_BACKENDS, WEIGHT_BITS, BuildConfig, ModelConfig
from minicache_trt.errors import UserError
from minicache_trt.units import format_bytes

BASE_BYTES = 700 << 20
"""Memory beside the weights: libraries and networks."""
MEMORY_FACTOR = 2.3
"""Peak memory per byte of weights, in the engine's type."""
ENGINE_FACTOR = 1.03
"""Size of the engine files per byte of weights."""
ENGINE_BASE_BYTES = 40 << 20


@dataclass(frozen=True)
class BuildNeeds:
    """``weight_bytes``: of all weights as the engine holds them. ``memory_bytes``: peak. ``disk_bytes``: peak, cast and
    quantized weights included."""

    weight_bytes: int
    memory_bytes: int
    disk_bytes: int


@dataclass(frozen=True)
class Room:
    """What a machine has left: bytes of memory, and of the disk that ``directory`` is on."""

    memory_bytes: int
    disk_bytes: int
    directory: Path

    @classmethod
    def here(cls, directory: Path) -> Room:
        """``directory`` need not exist."""
        existing = next(path for path in (directory, *directory.absolute().parents) if path.exists())
        return cls(available_memory(), shutil.disk_usage(existing).free, existing)


def build_needs(config: ModelConfig, build: BuildConfig) -> BuildNeeds | None:
    """Estimate for a model whose checkpoint is of ``config.dtype``; None for backends that only link its weights.

    ``build`` has a compute type.
    """
    if build.backend not in TENSORRT_BACKENDS:
        return None
    weights, codes = _weight_bytes(config, build)
    engine = int(weights * ENGINE_FACTOR) + ENGINE_BASE_BYTES
    # Beside the engine: weights cast to its type; codes as they are kept, and as TensorRT takes them.
    beside = codes + weights if codes else 0 if config.dtype == build.dtype else weights
    return BuildNeeds(weights, int(BASE_BYTES + MEMORY_FACTOR * weights), engine + beside)


def _weight_bytes(config: ModelConfig, build: BuildConfig) -> tuple[int, int]:
    """Bytes of all weights as the engine holds them, and those of them that are codes of a weight-only format."""
    item, bits = ITEM_SIZES[build.dtype], WEIGHT_BITS.get(build.weights)
    shapes = weight_shapes(config)
    plain = sum(math.prod(shape) for shape in shapes.values()) * item
    if bits is None:
        return plain, 0
    linears = linear_weights(config)
    codes = sum(
        rows * (columns * bits // 8 + item * (1 if bits == 8 else -(-columns // build.group_size)))
        for rows, columns in (shapes[weight] for weight in linears.values())
    )
    replaced = sum(math.prod(shapes[f"{name}.weight"]) for name in linears if f"{name}.weight" in shapes) * item
    return plain - replaced + codes, codes


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


def check_room(needs: BuildNeeds, room: Room, build: BuildConfig) -> None:
    """Refuse a build that cannot fit.

    Raises
    ------
    UserError
        The machine has too little memory, or the disk too little space.
    """
    what = f"building with {build.backend} in {build.dtype}"
    if needs.memory_bytes > room.memory_bytes:
        raise UserError(
            f"{what} needs about {format_bytes(needs.memory_bytes)} of memory ({format_bytes(needs.weight_bytes)} of "
            f"weights), this machine has {format_bytes(room.memory_bytes)} free",
            "build on a machine with more memory: a TensorRT-RTX engine is built without a GPU",
        )
    if needs.disk_bytes > room.disk_bytes:
        raise UserError(
            f"{what} needs about {format_bytes(needs.disk_bytes)} of disk, {room.directory} has "
            f"{format_bytes(room.disk_bytes)} free",
            "free some space, or choose another --output",
        )
