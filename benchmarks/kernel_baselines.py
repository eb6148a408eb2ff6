"""Attention of others over the same shapes, uncompressed."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch
from gpu import seconds
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

from minicache_trt.config import BLOCK_SIZE, ModelConfig

_DTYPE = torch.float16


def decode_baselines(
    config: ModelConfig, batch: int, tokens: int, device: torch.device, repeats: int
) -> tuple[str, float]:
    """Name and seconds of the fastest fp16 decode attention at hand.

    Raises
    ------
    torch.OutOfMemoryError
        Keys and values do not fit the GPU.
    """
    times: dict[str, float] = {}
    _torch_attention(times, config, batch, tokens, device, repeats)
    if importlib.util.find_spec("flashinfer") is not None:
        _try(times, "FlashInfer", _flashinfer(config, batch, tokens, device), repeats)
    best = min(times, key=lambda name: times[name])
    return best, times[best]


def _torch_attention(
    times: dict[str, float], config: ModelConfig, batch: int, tokens: int, device: torch.device, repeats: int
) -> None:
    """PyTorch's fused attentions over contiguous keys and values."""
    shape = (batch, config.num_kv_heads, tokens, config.head_dim)
    k, v = (torch.randn(shape, dtype=_DTYPE, device=device) for _ in range(2))
    q = torch.randn(batch, config.num_heads, 1, config.head_dim, dtype=_DTYPE, device=device)
    for name, backend in (("torch flash", SDPBackend.FLASH_ATTENTION), ("torch cuDNN", SDPBackend.CUDNN_ATTENTION)):

        def run(backend: SDPBackend = backend) -> torch.Tensor:
            with sdpa_kernel(backend):
                return scaled_dot_product_attention(q, k, v, enable_gqa=config.group_size > 1)

        _try(times, name, run, repeats)


def _try(times: dict[str, float], name: str, run: Callable[[], object], repeats: int) -> None:
    """Add the time of a call; one that refuses this shape has none."""
    try:
        with torch.inference_mode():
            times[name] = seconds(run, repeats)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:
        return


def _flashinfer(config: ModelConfig, batch: int, tokens: int, device: torch.device) -> Callable[[], object]:
    """Paged decode over pages of our block size, planned once."""
    import flashinfer

    pages = -(-tokens // BLOCK_SIZE)
    workspace = torch.empty(256 << 20, dtype=torch.uint8, device=device)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "HND", use_tensor_cores=config.group_size > 1)
    starts = torch.arange(batch + 1, dtype=torch.int32, device=device) * pages
    ids = torch.randperm(batch * pages, device=device).int()
    last = torch.full((batch,), (tokens - 1) % BLOCK_SIZE + 1, dtype=torch.int32, device=device)
    heads, kv_heads, dim = config.num_heads, config.num_kv_heads, config.head_dim
    wrapper.plan(starts, ids, last, heads, kv_heads, dim, BLOCK_SIZE, q_data_type=_DTYPE, kv_data_type=_DTYPE)
    kv = torch.randn(batch * pages, 2, kv_heads, BLOCK_SIZE, dim, dtype=_DTYPE, device=device)
    q = torch.randn(batch, heads, dim, dtype=_DTYPE, device=device)
    return lambda: wrapper.run(q, kv)


def flash_prefill_seconds(config: ModelConfig, history: int, chunk: int, device: torch.device, repeats: int) -> float:
    """PyTorch's flash attention of a chunk behind a history, causal."""
    total = history + chunk
    q = torch.randn(1, config.num_heads, chunk, config.head_dim, dtype=_DTYPE, device=device)
    shape = (1, config.num_kv_heads, total, config.head_dim)
    k, v = (torch.randn(shape, dtype=_DTYPE, device=device) for _ in range(2))
    # Heads are repeated beforehand, so that flash attention takes every version's inputs.
    k, v = (x.repeat_interleave(config.group_size, 1) for x in (k, v))
    bias = causal_lower_right(chunk, total)
    with torch.inference_mode(), sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return seconds(lambda: scaled_dot_product_attention(q, k, v, attn_mask=bias), repeats)
