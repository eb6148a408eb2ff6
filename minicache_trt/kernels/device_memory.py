"""Memory of a device through PyTorch's allocator: what is free, zeroed pools, and errors of one line."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from minicache_trt.compression.plan import CompressionPlan
from minicache_trt.config import ModelConfig
from minicache_trt.contract import compressed_pools, full_pools
from minicache_trt.errors import UserError

_LESS_MEMORY = "lower --kv-cache-memory or --kv-cache-free-gpu-memory-fraction, or build with smaller limits"


def free_memory(device: torch.device, pools: Iterable[Tensor]) -> int | None:
    """Bytes a cache may take once ``pools``, those of the one there is, are freed; None on the CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(device)
    return free + sum(pool.nbytes for pool in pools)


@contextmanager
def one_line_errors(what: str) -> Iterator[None]:
    """`UserError` in place of PyTorch's for a GPU that has too little memory for ``what``."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(f"the GPU has too little memory for {what}", _LESS_MEMORY) from error


@contextmanager
def allocating_cache(device: torch.device) -> Iterator[None]:
    """`UserError` in place of PyTorch's where a cache does not fit."""
    try:
        yield
    except RuntimeError as error:  # torch.OutOfMemoryError is one; on the CPU PyTorch raises nothing more specific
        where = "the GPU" if device.type == "cuda" else "the machine"
        raise UserError(f"{where} has too little memory for the cache", _LESS_MEMORY) from error


def zeroed_pools(
    config: ModelConfig,
    plan: CompressionPlan,
    blocks: tuple[int, int],
    dtype: torch.dtype,
    device: torch.device,
) -> dict[str, Tensor]:
    """Pools of both tiers by their contract names, zeroed; ``blocks``: full and compressed.

    Raises
    ------
    torch.OutOfMemoryError, RuntimeError
        The device has too little memory.
    """
    types = {"model": dtype, "int8": torch.int8, "float16": torch.float16}
    tiers = zip((full_pools(config), compressed_pools(plan, config)), blocks, strict=True)
    return {
        pool.name: torch.zeros(count, *pool.shape, dtype=types[pool.dtype], device=device)
        for pools, count in tiers
        for pool in pools
    }


def pool_array(pool: Tensor) -> NDArray[np.generic]:
    """A copy of a pool in the machine's memory; bfloat16 as float32."""
    tensor = pool.cpu()
    array: NDArray[np.generic] = (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
    return array
