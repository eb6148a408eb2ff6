"""Whether an implementation's stored blocks agree with the independent reference, up to ties."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from minicache_trt.compression.plan import CompressionPlan
from minicache_trt.contract import StreamLayout
from minicache_trt.reference import Constants
from minicache_trt.reference.codec import EncodedBlocks, encode
from minicache_trt.reference.ties import Ties, adopt

ROUNDING = {torch.float32: 3e-5, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
"""Of a result, relative to the largest number of its vector."""
FACTORS = {torch.float32: 0.0, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-10}
"""Of stored numbers, maps and turns to binary16, relative to the Euclidean norm of a vector."""
MEAN_ROUNDING = {torch.float32: 1e-6, torch.float16: 2.0**-10.5, torch.bfloat16: 2.0**-8.5}
"""Root mean square of all results, relative to theirs."""


def assert_blocks_agree(
    plan: CompressionPlan,
    layout: StreamLayout,
    fields: dict[str, Tensor],
    x: Tensor,
    block_index: Tensor,
    model_dtype: torch.dtype = torch.float32,
) -> list[EncodedBlocks]:
    """Check the fields ``[N, ...]`` an implementation stored for ``x [m, N, H, B, D]``.

    Up to a thousandth of the codes may differ, beside those that float32 leaves open, each within the tolerance of its
    boundary. ``model_dtype``: compute type of the implementation.

    Returns the reference's encoding of each block, with the implementation's side taken in ties.
    """
    assert set(fields) == set(layout.pools)
    constants = Constants.from_plan(plan, layout.index, layout.config)
    ties, adopted = Ties(), []
    for n in range(x.shape[1]):
        block = x[:, n : n + 1]
        expected = encode(block, block_index[n : n + 1], layout.stream, model_dtype, constants)
        stored = {kind: _array(values[n]) for kind, values in fields.items()}
        adopted.append(adopt(layout, block, expected, stored, ties))
    assert ties.disagreements == 0, ties
    assert ties.differing_codes <= max(4, 1e-3 * ties.codes) + ties.uncertain_codes, ties
    return adopted


def _array(values: Tensor) -> NDArray[np.generic]:
    return (values.float() if values.dtype == torch.bfloat16 else values).numpy()


def assert_restored(layout: StreamLayout, mine: Tensor, theirs: Tensor, member: int) -> None:
    """Restored vectors ``mine`` are the twin's up to rounding."""
    dtype, apart = mine.dtype, (mine.float() - theirs).abs()
    limit = ROUNDING[dtype] * theirs.abs().amax(-1, keepdim=True) + FACTORS[dtype] * theirs.norm(dim=-1, keepdim=True)
    assert (apart <= limit + 1e-6).all(), (layout.stream, member, float((apart / (limit + 1e-6)).max()))
    mean = float(apart.square().mean().sqrt() / theirs.square().mean().sqrt())
    assert mean <= MEAN_ROUNDING[dtype], (layout.stream, member, mean)
