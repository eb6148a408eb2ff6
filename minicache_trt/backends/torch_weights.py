"""A checkpoint's weights as tensors of one type on one device."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from minicache_trt.checkpoint.quantize import changed_floats, iterate_dequantized, quantized_views
from minicache_trt.checkpoint.resolve import load_checkpoint
from minicache_trt.engine_directory import CHECKPOINT, QUANTIZED
from minicache_trt.parallel.shard import WHOLE, Shard, add_output_rows, shard_tensor, shard_view


def load_weights(directory: Path, device: torch.device, dtype: torch.dtype, shard: Shard = WHOLE) -> dict[str, Tensor]:
    """Weights of an engine directory by canonical name, one rank's share of them; weight-only formats are dequantized.

    Each is moved on its own, straight from the mapped file: beside what is returned, memory holds one weight at a time.
    Those of a CPU's float32 checkpoint stay where they are, in the file.

    Raises
    ------
    UserError
        The checkpoint cannot be read.
    """
    views = load_checkpoint(str(directory / CHECKPOINT)).weights
    dequantized = set()
    result: dict[str, Tensor] = {}
    if (directory / QUANTIZED).exists():
        for name, weight in iterate_dequantized(directory / QUANTIZED, views):
            dequantized.add(f"{name}.weight")
            part = shard_tensor(f"{name}.weight", torch.from_numpy(weight), shard)
            part = part if shard.size == 1 else part.clone()  # a view would keep all of the weight
            result[f"{name}.weight"] = part.to(device).to(dtype)
        views = views | changed_floats(quantized_views(directory / QUANTIZED))
    for name, view in views.items():
        if name not in dequantized:
            result[name] = shard_view(name, view, shard).to(device).to(dtype).contiguous()
    add_output_rows(result, shard)
    return result
