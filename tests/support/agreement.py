"""Whether an implementation's stored blocks agree with the independent reference, up to ties."""

from __future__ import annotations

from torch import Tensor

from minicache_trt.contract import StreamLayout
from minicache_trt.reference.codec import EncodedBlocks, encode
from minicache_trt.reference.ties import Ties, adopt


def assert_blocks_agree(
    layout: StreamLayout, fields: dict[str, Tensor], x: Tensor, block_index: Tensor
) -> list[EncodedBlocks]:
    """Check the fields ``[N, ...]`` an implementation stored for ``x [m, N, H, B, D]``.

    Returns the reference's encoding of each block, with the implementation's side taken in ties.
    """
    assert set(fields) == set(layout.pools)
    ties, adopted = Ties(), []
    for n in range(x.shape[1]):
        block = x[:, n : n + 1]
        expected = encode(block, block_index[n : n + 1], layout.stream)
        stored = {kind: values[n].numpy() for kind, values in fields.items()}
        adopted.append(adopt(layout, block, expected, stored, ties))
    assert ties.disagreements == 0, ties
    assert ties.differing_codes <= max(4, 1e-3 * ties.codes), ties
    return adopted
