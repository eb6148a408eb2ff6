"""Random streams with random matrices, and what an engine would store of them, for tests of the reference."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from minicache_trt.compression.matrices import check_matrices
from minicache_trt.compression.segment import Segment
from minicache_trt.compression.stream import Stream
from minicache_trt.config import BLOCK_SIZE, ModelConfig
from minicache_trt.contract import StreamLayout
from minicache_trt.reference import Constants, EncodedBlocks, EncodedSegment
from minicache_trt.reference.rotation import rope_frequencies

HEADS, D = 2, 32
CONFIG = ModelConfig("llama", 8, 64, 64, 2 * HEADS, HEADS, D, 100, 4096)
QUANTIZED = ("fp8", "int8", "int4", "int2")
GAUSSIAN = ("g4", "g3", "g2", "g1")


def random_matrices(stream: Stream, seed: int) -> dict[str, NDArray[np.generic]]:
    """Permutations, rotations, and the KLT of a random covariance with standard deviations from 4 down to 1 / 4."""
    rng = np.random.default_rng(seed)
    members, width = len(stream.layers), len(stream.layers) * D
    result: dict[str, NDArray[np.generic]] = {}
    if stream.match_heads:
        result["head_map"] = np.stack([rng.permutation(HEADS) for _ in range(members)]).astype(np.int32)
    if stream.align:
        result["align"] = np.linalg.qr(rng.normal(size=(members, HEADS, D, D)))[0].astype(np.float32)
    if stream.merge == "linear":
        axes = np.linalg.qr(rng.normal(size=(HEADS, width, width)))[0]
        result["encode"] = axes[:, :, : stream.rank].astype(np.float32)
        result["decode"] = axes[:, :, : stream.rank].swapaxes(1, 2).astype(np.float32)
        result["mean"] = (rng.normal(size=(HEADS, width)) / 4).astype(np.float32)
        if stream.gaussian:
            sigma = np.geomspace(4, 0.25, width)[: stream.rank]
            result["sigma"] = np.tile(sigma, (HEADS, 1)).astype(np.float32)
    check_matrices({f"streams.0.{name}": value for name, value in result.items()}, 0, stream, CONFIG)
    return result


def random_constants(stream: Stream, seed: int) -> Constants:
    return Constants.of(stream, random_matrices(stream, seed), rope_frequencies(CONFIG.rope, D))


def random_group(stream: Stream, constants: Constants, blocks: int, seed: int) -> Tensor:
    """Layers that are partly alike, in the spectrum of a linear stream's matrices: ``[m, N, H, B, D]``."""
    generator = torch.Generator().manual_seed(seed)
    shape = (blocks, HEADS, BLOCK_SIZE, D)
    if constants.decode is not None and constants.mean is not None and constants.sigma is not None:
        y = torch.randn(blocks, HEADS, BLOCK_SIZE, stream.rank, generator=generator) * constants.sigma[:, None]
        wide = y @ constants.decode + constants.mean[:, None]
        layers = torch.stack(wide.chunk(len(stream.layers), dim=-1))
        numbers = torch.arange(blocks)
        return constants.from_slots(constants.from_basis(layers, numbers)).to(torch.float32)
    common = torch.randn(shape, generator=generator)
    return torch.stack([common + torch.randn(shape, generator=generator) for _ in stream.layers])


@st.composite
def segmentations(draw: st.DrawFn, total: int, formats: tuple[str, ...]) -> tuple[Segment, ...]:
    """One to four segments of ``total`` components, at least one of them stored."""
    cuts = draw(st.lists(st.sampled_from(range(16, total, 16)), max_size=3, unique=True)) if total > 16 else []
    edges = [0, *sorted(cuts), total]
    segments = [
        Segment(
            high - low,
            draw(st.sampled_from(formats)),
            draw(st.sampled_from(["token", "channel"])),
            draw(st.sampled_from(["none", "hadamard"])),
        )
        for low, high in pairwise(edges)
    ]
    if len(segments) > 1 and draw(st.booleans()):
        segments[-1] = Segment(segments[-1].length, "drop")
    return tuple(segments)


@st.composite
def streams(draw: st.DrawFn) -> Stream:
    """Any stream of `CONFIG`."""
    part, merge = draw(st.sampled_from(["key", "value"])), draw(st.sampled_from(["none", "mean", "slerp", "linear"]))
    lowest, highest = {"none": (1, 1), "linear": (1, 3)}.get(merge, (2, 4))
    members = draw(st.integers(lowest, highest))
    total = D if merge != "linear" else 16 * draw(st.integers(1, min(members * D, 96) // 16))
    kinds = [("model", *QUANTIZED)] if merge == "slerp" else [("model", *QUANTIZED), GAUSSIAN]
    retained = draw(st.sampled_from([0, 1, 3, 8])) if merge != "none" else 0
    return Stream(
        part,
        tuple(range(members)),
        draw(segmentations(total, draw(st.sampled_from(kinds)))),
        merge=merge,
        basis=draw(st.sampled_from(["post_rope", "pre_rope"])) if part == "key" else "post_rope",
        align=draw(st.booleans()),
        match_heads=draw(st.booleans()),
        t=draw(st.sampled_from([0.0, 0.3, 0.6, 1.0])),
        norm=draw(st.sampled_from(["head", "token"])),
        retained=retained,
        retention=draw(st.sampled_from(["topk", "threshold", "paper_literal"])),
        gamma=draw(st.sampled_from([0.05, 0.3, 1.0])),
        sink_tokens=draw(st.integers(0, retained)),
        retained_format=draw(st.sampled_from(["model", "fp8", "int8", "int4"])),
        residual=draw(st.sampled_from(["none", "int8", "int4", "int2"])) if merge == "slerp" else "none",
    )


# ------------------------------------------------------------------------------------------------- an engine's pools


def pack_vector(codes: list[int], bits: int) -> list[int]:
    """One vector's codes as one long number, the first code lowest, cut into bytes, lowest first, minus 128."""
    number = sum(code << (bits * place) for place, code in enumerate(codes))
    return [byte - 128 for byte in number.to_bytes(len(codes) * bits // 8, "little")]


def pack(codes: Tensor, bits: int) -> NDArray[np.int8]:
    """``[..., length]`` to ``[..., bytes]``."""
    rows = [pack_vector(row, bits) for row in codes.flatten(0, -2).tolist()]
    return np.array(rows, dtype=np.int8).reshape(*codes.shape[:-1], codes.shape[-1] * bits // 8)


def engine_blocks(layout: StreamLayout, encoded: EncodedBlocks) -> dict[str, NDArray[Any]]:
    """The pools of the first block of ``encoded``."""
    parts: dict[str, list[NDArray[Any]]] = {"latent": [], "codes": [], "params": []}
    for segment in encoded.segments:
        if segment.values is not None:
            parts["latent"].append(segment.values[0].numpy())
        if segment.codes is not None:
            parts["codes"].append(pack(segment.codes[0], segment.segment.bits))
        parts["params"] += [p[0].numpy() for p in (segment.scale, segment.minimum) if p is not None]
    pools = {kind: np.concatenate(arrays, axis=-1) for kind, arrays in parts.items() if arrays}
    if encoded.norms is not None:
        pools["norms"] = encoded.norms[0].numpy()
    if encoded.residual is not None:
        pools |= _vectors("residual", encoded.residual)
    if encoded.stream.retained:
        pools |= _vectors("exact", encoded.exact_numbers)
        pools["retained_index"] = encoded.retained_index[0].numpy().astype(np.int8)
    for kind, spec in layout.pools.items():
        assert pools[kind].shape == spec.shape, kind
        assert spec.dtype == "model" or pools[kind].dtype == spec.dtype, kind
    assert pools.keys() == layout.pools.keys()
    return pools


def _vectors(kind: str, numbers: EncodedSegment) -> dict[str, NDArray[Any]]:
    if numbers.values is not None:
        return {kind: numbers.values[0].numpy()}
    assert numbers.codes is not None
    params = [p[0].numpy() for p in (numbers.scale, numbers.minimum) if p is not None]
    return {
        kind: pack(numbers.codes[0], numbers.segment.bits),
        f"{kind}_params": np.concatenate(params, axis=-1),
    }
