"""Judging an engine's stored blocks: the reference's own pass, as do those of a float32 engine; errors are counted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from minicache_trt.compression.segment import Segment
from minicache_trt.compression.stream import Stream
from minicache_trt.config import BLOCK_SIZE
from minicache_trt.contract import stream_layout
from minicache_trt.reference import encode, restore
from minicache_trt.reference.ties import Ties, adopt
from tests.support.reference_streams import (
    CONFIG,
    D,
    engine_blocks,
    pack_vector,
    random_constants,
    random_group,
    streams,
)

Pools = dict[str, NDArray[Any]]


def judge(stream: Stream, change: Callable[[Pools], None] | None = None, seed: int = 0, number: int = 0) -> Ties:
    """Ties of the reference's own blocks, after ``change``."""
    constants = random_constants(stream, seed)
    x = random_group(stream, constants, 1, seed)
    encoded = encode(x, torch.tensor([number]), stream, constants=constants)
    layout, ties = stream_layout(0, stream, CONFIG), Ties()
    pools = {kind: pool.copy() for kind, pool in engine_blocks(layout, encoded).items()}
    if change is not None:
        change(pools)
    adopt(layout, x, encoded, pools, ties)
    return ties


def test_packing_by_hand() -> None:
    """Three bits: 1 + 2 * 8 + 3 * 64 + 4 * 512 + ... read from the lowest byte."""
    assert [byte + 128 for byte in pack_vector([1, 2, 3, 4, 5, 6, 7, 0], 3)] == [0b11010001, 0b01011000, 0b00011111]
    assert [byte + 128 for byte in pack_vector([1, 2, 3, 0], 2)] == [0b00111001]
    assert [byte + 128 for byte in pack_vector([0xA, 0x5], 4)] == [0x5A]


@settings(max_examples=150, deadline=None)
@given(stream=streams(), seed=st.integers(0, 2**20), number=st.sampled_from([0, 1, 40]))
def test_adopting_its_own_blocks_changes_nothing(stream: Stream, seed: int, number: int) -> None:
    constants = random_constants(stream, seed)
    x = random_group(stream, constants, 1, seed)
    encoded = encode(x, torch.tensor([number]), stream, constants=constants)
    layout, ties = stream_layout(0, stream, CONFIG), Ties()
    adopted = adopt(layout, x, encoded, engine_blocks(layout, encoded), ties)
    stored = encoded.segments + tuple(s for s in (encoded.residual, encoded.exact_numbers) if s is not None)
    codes = sum(s.codes.numel() for s in stored if s.codes is not None)
    retained = encoded.retained_index.numel()
    # Clamped codes of ranges whose scale was rounded down lie outside by at most what float32 leaves.
    own = Ties(codes=codes, retained=retained, farthest=ties.farthest, uncertain_codes=ties.uncertain_codes)
    assert ties == own and ties.farthest < 1e-5
    assert torch.equal(restore(adopted), restore(encoded))


@settings(max_examples=150, deadline=None)
@given(stream=streams(), seed=st.integers(0, 2**20), number=st.sampled_from([0, 1, 40]))
def test_an_engine_that_rounds_differently_is_right(stream: Stream, seed: int, number: int) -> None:
    """Its numbers are off by a few float32 roundings."""
    constants = random_constants(stream, seed)
    x = random_group(stream, constants, 1, seed)
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed + 1))
    index = torch.tensor([number])
    engine = encode(x * (1 + 1e-7 * noise), index, stream, constants=constants)
    layout, ties = stream_layout(0, stream, CONFIG), Ties()
    mine = encode(x, index, stream, constants=constants)
    adopted = adopt(layout, x, mine, engine_blocks(layout, engine), ties)
    assert ties.disagreements == 0, ties
    torch.testing.assert_close(restore(adopted), restore(engine), rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------------------------------------------------ errors


def latent(*segments: Segment, **options: Any) -> Stream:
    """A linear stream of two layers with every other feature on."""
    return Stream("key", (0, 1), segments, merge="linear", basis="pre_rope", align=True, match_heads=True, **options)


def slerp(**options: Any) -> Stream:
    return Stream("value", (0, 1), (Segment(D, "int4", "channel"),), merge="slerp", residual="int4", **options)


def scaled(kind: str, place: tuple[int, ...], factor: float) -> Callable[[Pools], None]:
    def change(pools: Pools) -> None:
        pools[kind][place] = pools[kind][place] * factor

    return change


def test_flipped_bits_of_codes_are_counted() -> None:
    """The highest bit of a code moves it by half of all codes."""
    for bits in (2, 3, 4):
        stream = latent(Segment(32, f"g{bits}", transform="hadamard"))
        for byte in (0, bits - 1):
            # The highest bit of the first code, or of the eighth, which ends the byte.
            flip = (1 << (bits - 1)) if byte == 0 else 128

            def change(pools: Pools, byte: int = byte, flip: int = flip) -> None:
                pools["codes"][1, 5, byte] = ((int(pools["codes"][1, 5, byte]) + 128) ^ flip) - 128

            assert judge(stream, change).disagreements == 1


@pytest.mark.parametrize("fmt", ["fp8", "int8", "int4", "int2"])
@pytest.mark.parametrize("axis", ["token", "channel"])
def test_wrong_codes_scales_and_minima_are_counted(fmt: str, axis: str) -> None:
    stream = latent(Segment(16, fmt, axis), Segment(16, "drop"))
    assert judge(stream).disagreements == 0

    def flip(pools: Pools) -> None:
        pools["codes"][0, 7, 3] = ((int(pools["codes"][0, 7, 3]) + 128) ^ 0x22) - 128

    assert judge(stream, flip).disagreements >= 1
    assert judge(stream, scaled("params", (0, 2), 1.05)).disagreements >= 1
    if fmt != "fp8":
        count = BLOCK_SIZE if axis == "token" else 16
        assert judge(stream, scaled("params", (0, count + 2), 1.3)).disagreements >= 1


def test_wrong_norms_are_counted() -> None:
    assert judge(slerp(), scaled("norms", (1, 0, 9), 1.01)).disagreements == 1
    assert judge(latent(Segment(16, "g4")), scaled("norms", (0, 1, 9), 1.01)).disagreements >= 1


def test_a_nan_is_counted() -> None:
    assert judge(slerp(), scaled("norms", (1, 0, 9), float("nan"))).disagreements >= 1
    stream = latent(Segment(16, "fp8"))
    assert judge(stream, lambda pools: pools["codes"].__setitem__((0, 0, 0), 127 - 128)).disagreements == 1
    assert judge(latent(Segment(16)), scaled("latent", (0, 0, 0), float("nan"))).disagreements == 1


def test_wrong_residuals_are_counted() -> None:
    def flip(pools: Pools) -> None:
        pools["residual"][1, 0, 3, 5] = ((int(pools["residual"][1, 0, 3, 5]) + 128) ^ 8) - 128

    assert judge(slerp(), flip).disagreements == 1
    assert judge(slerp(), scaled("residual_params", (1, 0, 3), 1.1)).disagreements >= 1


@pytest.mark.parametrize("fmt", ["model", "fp8", "int8", "int4"])
def test_wrong_retained_vectors_are_counted_but_not_unused_ones(fmt: str) -> None:
    stream = slerp(retained=4, retention="threshold", gamma=0.0, sink_tokens=1, retained_format=fmt)
    constants = random_constants(stream, 0)
    x = random_group(stream, constants, 1, 0)
    index = encode(x, torch.tensor([0]), stream).retained_index
    assert index[0].tolist() == [[0, -1, -1, -1]] * 2  # nothing lies above the maximum

    def overwrite(slot: int) -> Callable[[Pools], None]:
        def change(pools: Pools) -> None:
            pools["exact"][1, 0, slot] = -pools["exact"][1, 0, slot] - (fmt != "model") + 1

        return change

    assert judge(stream, overwrite(1)).disagreements == 0
    assert judge(stream, overwrite(0)).disagreements >= 1
    if fmt != "model":
        assert judge(stream, scaled("exact_params", (1, 0, 0), 1.1)).disagreements >= 1
        assert judge(stream, scaled("exact_params", (1, 0, 3), 1.1)).disagreements == 0


@pytest.mark.parametrize("retention", ["topk", "threshold", "paper_literal"])
def test_wrong_retained_positions_are_counted(retention: str) -> None:
    """An engine that retains another position, and stores everything else as follows from it."""
    stream = slerp(retained=3, retention=retention, gamma=0.5)
    constants = random_constants(stream, 0)
    x = random_group(stream, constants, 1, 0)
    mine = encode(x, torch.tensor([1]), stream)
    index = mine.retained_index.clone()
    index[0, 0, -1] = 63 if index[0, 0, -1] != 63 else 62
    engine = encode(x, torch.tensor([1]), stream, retained_index=index)
    layout, ties = stream_layout(0, stream, CONFIG), Ties()
    adopted = adopt(layout, x, mine, engine_blocks(layout, engine), ties)
    assert 1 <= ties.disagreements <= 2 and ties.differing_retained == 2 and ties.farthest > 1e-3
    assert torch.equal(restore(adopted), restore(engine))


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**20))
def test_what_float32_leaves_uncertain_is_no_disagreement(seed: int) -> None:
    """Parallel layers: their residuals are nothing but rounding errors, in steps as small."""
    stream = Stream("value", (0, 1), (Segment(D),), merge="slerp", residual="int2")
    generator = torch.Generator().manual_seed(seed)
    first = torch.randn(1, CONFIG.num_kv_heads, BLOCK_SIZE, D, generator=generator)
    x = torch.stack([first, 3 * first])
    mine = encode(x, torch.tensor([0]), stream)
    engine = encode(x * (1 + 3e-7 * torch.randn(x.shape, generator=generator)), torch.tensor([0]), stream)
    layout, ties = stream_layout(0, stream, CONFIG), Ties()
    adopt(layout, x, mine, engine_blocks(layout, engine), ties)
    assert ties.disagreements == 0 and ties.differing_codes > 0, ties


@pytest.mark.parametrize("row", [[3, 2, 1], [1, 1, 2], [-1, 4, 5], [4, -1, 5], [1, 2, 64], [-2, -1, -1]])
def test_malformed_positions_are_counted(row: list[int]) -> None:
    def change(pools: Pools) -> None:
        pools["retained_index"][0] = row

    assert judge(slerp(retained=3), change).disagreements >= 1


def test_a_dropped_sink_and_a_slot_left_empty_are_counted() -> None:
    def drop_first(pools: Pools) -> None:
        row = pools["retained_index"][0]
        row[:] = [*row[1:], -1]

    assert judge(slerp(retained=3, sink_tokens=1), drop_first).disagreements >= 1
    assert judge(slerp(retained=3), drop_first, number=1).disagreements >= 1


def test_equal_scores_may_be_decided_either_way() -> None:
    """All tokens alike: any of them may be retained, and codes follow from the choice."""
    stream = slerp(retained=2)
    x = torch.ones(2, 1, CONFIG.num_kv_heads, BLOCK_SIZE, D)
    x[1, ..., ::2] = 0.5
    encoded = encode(x, torch.tensor([1]), stream)
    assert encoded.retained_index[0, 0].tolist() == [0, 1]
    other = encode(x, torch.tensor([1]), stream, retained_index=torch.tensor([[[0, 1], [10, 63]]]))
    ties = Ties()
    layout = stream_layout(0, stream, CONFIG)
    adopted = adopt(layout, x, encoded, engine_blocks(layout, other), ties)
    assert ties.disagreements == 0 and ties.differing_retained == 4
    assert torch.equal(restore(adopted), restore(other))


def test_a_code_at_its_boundary_is_a_tie_and_one_beyond_it_is_not() -> None:
    stream = Stream("value", (0,), (Segment(D, "int4"),))
    x = torch.zeros(1, 1, CONFIG.num_kv_heads, BLOCK_SIZE, D)
    x[..., 0], x[..., 1] = 15.0, 4.5
    layout = stream_layout(0, stream, CONFIG)
    for value, disagreements in ((4.5, 0), (4.4995, 0), (4.49, 1)):
        x[0, 0, 0, 0, 1] = value
        encoded, ties = encode(x, torch.tensor([0]), stream), Ties()
        pools = engine_blocks(layout, encoded)
        pools["codes"][0, 0, 0] = pack_vector([15, 5], 4)[0]
        adopt(layout, x, encoded, pools, ties)
        assert (ties.differing_codes, ties.disagreements) == (1, disagreements)
