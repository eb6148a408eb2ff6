"""`append_kv` of the host build against indexing in PyTorch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from minicache_trt.kernels.codec import append_kv
from minicache_trt.kernels.library import KernelError, KernelLibrary

BLOCK, BLOCKS = 64, 5


def expected(kv: Tensor, k: Tensor, v: Tensor, slots: Tensor) -> Tensor:
    result, heads, dim = kv.clone(), kv.shape[2], kv.shape[4]
    limit = 3e38 if kv.dtype == torch.float32 else torch.inf
    for part, new in enumerate((k, v)):
        rows = new.reshape(len(new), heads, dim)
        rows = torch.where(rows.float().abs() < limit, rows, torch.zeros_like(rows))
        for token, slot in enumerate(slots.tolist()):
            result[slot // BLOCK, part, :, slot % BLOCK] = rows[token]
    return result


def numbers(tokens: int, heads: int, dim: int, dtype: torch.dtype) -> Tensor:
    """Random rows with numbers that are not finite in places, and the largest ones that are."""
    x = torch.randn(tokens, heads * dim).to(dtype)
    x[0, 3], x[-1, 0], x[tokens // 2, -1] = torch.nan, torch.inf, -torch.inf
    x[0, 1], x[0, 2] = min(torch.finfo(dtype).max, 2.9e38), torch.finfo(dtype).smallest_normal
    if dtype == torch.float32:
        x[0, 4], x[0, 5] = 3e38, -3.2e38
    return x


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("heads", "dim"), [(1, 16), (2, 80), (3, 128), (8, 256)])
@pytest.mark.parametrize("tokens", [1, 7, 70])
def test_numbers_reach_their_slots(
    host_library: KernelLibrary, tokens: int, heads: int, dim: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    kv = torch.randn(BLOCKS, 2, heads, BLOCK, dim).to(dtype)
    k, v = numbers(tokens, heads, dim, dtype), numbers(tokens, heads, dim, dtype)
    slots = torch.randperm(BLOCKS * BLOCK)[:tokens].to(torch.int32)
    wanted = expected(kv, k, v, slots)
    append_kv(host_library, kv, k, v, slots)
    assert torch.equal(kv, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_rows_of_a_joint_projection(host_library: KernelLibrary, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    kv, joint = torch.randn(BLOCKS, 2, 2, BLOCK, 48).to(dtype), torch.randn(9, 96 * 5).to(dtype)
    k, v, slots = joint[:, 288:384], joint[:, 384:], torch.arange(60, 69, dtype=torch.int32)
    wanted = expected(kv, k, v, slots)
    append_kv(host_library, kv, k, v, slots)
    assert torch.equal(kv, wanted)


def test_no_tokens_and_slots_outside_change_nothing(host_library: KernelLibrary) -> None:
    kv, new = torch.randn(BLOCKS, 2, 1, BLOCK, 16), torch.ones(2, 16)
    before = kv.clone()
    append_kv(host_library, kv, new[:0], new[:0], torch.zeros(0, dtype=torch.int32))
    append_kv(host_library, kv, new, new, torch.tensor([-1, BLOCKS * BLOCK], dtype=torch.int32))
    assert torch.equal(kv, before)


def test_arguments_are_checked(host_library: KernelLibrary) -> None:
    kv, new, slots = torch.zeros(BLOCKS, 2, 1, BLOCK, 16), torch.ones(2, 16), torch.zeros(2, dtype=torch.int32)
    k, v, s = new.data_ptr(), new.data_ptr(), slots.data_ptr()
    for arguments, message in (
        ((0, None, BLOCKS, 1, 16, k, v, 16, 16, s, 2, 0), "kv is null"),
        ((0, kv.data_ptr(), BLOCKS, 1, 16, None, v, 16, 16, s, 2, 0), "k is null"),
        ((0, kv.data_ptr(), BLOCKS, 1, 16, k, None, 16, 16, s, 2, 0), "v is null"),
        ((0, kv.data_ptr(), BLOCKS, 1, 16, k, v, 16, 16, None, 2, 0), "slot_mapping is null"),
        ((0, kv.data_ptr(), BLOCKS, 1, 16, k + 4, v, 16, 16, s, 2, 0), "k is not aligned to 16 bytes"),
        (
            (0, kv.data_ptr(), BLOCKS, 1, 24, k, v, 24, 24, s, 2, 0),
            "head_dim: expected a multiple of 16 up to 256, got 24",
        ),
        ((0, kv.data_ptr(), BLOCKS, 1, 272, k, v, 272, 272, s, 2, 0), "got 272"),
        ((0, kv.data_ptr(), BLOCKS, 1, 16, k, v, 8, 16, s, 2, 0), "strides of at least 16, multiples of 4, got 8"),
        ((0, kv.data_ptr(), BLOCKS, 1, 16, k, v, 16, 18, s, 2, 0), "got 18"),
        ((0, kv.data_ptr(), 0, 1, 16, k, v, 16, 16, s, 2, 0), "blocks and heads >= 1, got 2, 0, 1"),
        ((0, kv.data_ptr(), BLOCKS, 1, 16, k, v, 16, 16, s, -2, 0), "tokens >= 0"),
        ((7, kv.data_ptr(), BLOCKS, 1, 16, k, v, 16, 16, s, 2, 0), "type 7 is not supported"),
    ):
        with pytest.raises(KernelError, match=f"append_kv: .*{message}"):
            host_library.call("append_kv", *arguments)
