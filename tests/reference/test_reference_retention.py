"""Retention rules of the reference against their definitions, one token at a time."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minicache_trt.compression.segment import Segment
from minicache_trt.compression.stream import Stream
from minicache_trt.config import BLOCK_SIZE
from minicache_trt.reference import EncodedBlocks, encode, restore
from minicache_trt.reference.retention import Ranking

D = 16


def encode_angles(degrees: list[float], block: int = 1, rest: float = 10.0, **options: Any) -> EncodedBlocks:
    """One block whose tokens have these angles between two layers; the positions after them have angle ``rest``."""
    stream = Stream("key", (0, 1), (Segment(D),), merge="slerp", **options)
    angles = torch.tensor(degrees + [rest] * (BLOCK_SIZE - len(degrees))).double().deg2rad()
    x = torch.zeros(2, 1, 1, BLOCK_SIZE, D)
    x[0, ..., 0] = 1.0
    x[1, ..., 0], x[1, ..., 1] = angles.cos().float(), angles.sin().float()
    return encode(x, torch.tensor([block]), stream)


def kept(encoded: EncodedBlocks) -> list[int]:
    row: list[int] = encoded.retained_index[0, 0].tolist()
    return row


def test_threshold_keeps_what_is_close_to_the_most_distant() -> None:
    """Angles 10 to 110 and gamma 0.25: above 85 degrees."""
    options: dict[str, Any] = {"retained": 4, "retention": "threshold", "gamma": 0.25}
    assert kept(encode_angles([80, 110, 90, 20], **options)) == [1, 2, -1, -1]
    assert kept(encode_angles([90, 110, 90, 91, 92, 93], **options)) == [1, 3, 4, 5]
    assert kept(encode_angles([90, 110, 90, 90, 90, 90], **options)) == [0, 1, 2, 3]


def test_paper_literal_keeps_what_is_close_to_the_least_distant() -> None:
    """Angles 10 to 110 and gamma 0.25: below 35 degrees."""
    options: dict[str, Any] = {"retained": 3, "retention": "paper_literal", "gamma": 0.25, "rest": 100.0}
    assert kept(encode_angles([40, 10, 110, 30], **options)) == [1, 3, -1]
    assert kept(encode_angles([20, 10, 110, 30, 15], **options)) == [0, 1, 4]


@pytest.mark.parametrize("retention", ["threshold", "paper_literal"])
def test_nothing_qualifies_at_gamma_zero_but_sinks(retention: str) -> None:
    options: dict[str, Any] = {"retained": 3, "retention": retention, "gamma": 0.0, "sink_tokens": 2}
    assert kept(encode_angles([50, 60], block=1, **options)) == [-1, -1, -1]
    assert kept(encode_angles([50, 60], block=0, **options)) == [0, 1, -1]


def test_meaningless_tokens_rank_first_but_never_for_the_literal_rule() -> None:
    """They have no part in the largest angle either: 110 degrees at gamma 0.25 keep those above 85."""
    degrees = [180.0, 110, 90, 50, 180.0]
    assert kept(encode_angles(degrees, retained=3, retention="threshold", gamma=0.25)) == [0, 1, 4]
    assert kept(encode_angles(degrees, retained=1, retention="threshold", gamma=0.25)) == [0]
    assert kept(encode_angles(degrees, retained=6, retention="threshold", gamma=0.25)) == [0, 1, 2, 4, -1, -1]
    # A block of meaningless tokens only.
    assert kept(encode_angles([], rest=180.0, retained=2, retention="threshold")) == [0, 1]
    assert kept(encode_angles([], rest=180.0, retained=2, retention="paper_literal")) == [-1, -1]
    literal = encode_angles([180.0] * 60 + [20], retained=32, retention="paper_literal", gamma=1.0)
    assert kept(literal) == [61, 62, 63] + [-1] * 29


def test_sinks_come_before_meaningless_tokens() -> None:
    options: dict[str, Any] = {"retained": 2, "sink_tokens": 1}
    for retention, expected in (("topk", [0, 3]), ("threshold", [0, 3]), ("paper_literal", [0, 5])):
        encoded = encode_angles([50, 60, 70, 180, 180, 5], 0, retention=retention, gamma=0.05, **options)
        assert kept(encoded) == expected


def test_unused_slots_override_nothing() -> None:
    encoded = encode_angles([80, 110], retained=4, retention="threshold", gamma=0.05)
    assert kept(encoded) == [1, -1, -1, -1]
    assert (encoded.exact[0, :, 0, 1:] == 0).all() and (encoded.exact[0, :, 0, 0] != 0).any()
    without = restore(encode_angles([80, 110]))
    same = (restore(encoded) == without).all(dim=-1)[:, 0, 0]
    assert (~same).nonzero()[:, 1].tolist() == [1, 1]


def brute_force(encoded: EncodedBlocks, block: int, head: int) -> list[int]:
    """One head's retained positions, in the words of the definition."""
    stream = encoded.stream
    score, useful = encoded.score[block, head].tolist(), encoded.meaningful[block, head].tolist()
    usable = [s for s, u in zip(score, useful, strict=True) if u]
    low, high = (min(usable), max(usable)) if usable else (0.0, 0.0)
    sinks = [i for i in range(stream.sink_tokens) if encoded.block_index[block] == 0]
    lists: list[list[int]] = [sinks]
    if stream.retention == "paper_literal":
        within = [i for i in range(64) if useful[i] and score[i] < low + (high - low) * stream.gamma]
        lists.append(sorted(within, key=lambda i: (score[i], i)))
    else:
        lists.append([i for i in range(64) if not useful[i]])
        within = [i for i in range(64) if useful[i]]
        if stream.retention == "threshold":
            within = [i for i in within if score[i] > high - (high - low) * stream.gamma]
        lists.append(sorted(within, key=lambda i: (-score[i], i)))
    order: list[int] = []
    for positions in lists:
        order += [i for i in positions if i not in order]
    chosen = sorted(order[: stream.retained])
    return chosen + [-1] * (stream.retained - len(chosen))


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    retention=st.sampled_from(["topk", "threshold", "paper_literal"]),
    norm=st.sampled_from(["head", "token"]),
    merge=st.sampled_from(["mean", "slerp"]),
    members=st.integers(2, 4),
    retained=st.integers(1, 16),
    sinks=st.integers(0, 5),
    gamma=st.sampled_from([0.0, 0.05, 0.5, 1.0]),
)
def test_rules_match_brute_force(
    seed: int, retention: str, norm: str, merge: str, members: int, retained: int, sinks: int, gamma: float
) -> None:
    stream = Stream(
        "value",
        tuple(range(members)),
        (Segment(D),),
        merge=merge,
        norm=norm,
        retained=retained,
        retention=retention,
        gamma=gamma,
        sink_tokens=min(sinks, retained),
    )
    x = torch.randn(members, 2, 2, BLOCK_SIZE, D, generator=torch.Generator().manual_seed(seed))
    x[:, 1, :, 10] = 0.0
    x[1, :, :, 20] = -x[0, :, :, 20]
    x[:, :, :, 30:33] = x[:, :, :, 29:30]
    encoded = encode(x, torch.tensor([0, 4]), stream)
    assert not encoded.meaningful[1, :, 10].any() and not encoded.meaningful[:, :, 20].any()
    for block in range(2):
        for head in range(encoded.score.shape[1]):
            assert encoded.retained_index[block, head].tolist() == brute_force(encoded, block, head)


def test_distances_from_the_boundary_by_hand() -> None:
    """Strengths 5, 4, 3, 2, 1, two places: 1.5 above the threshold, the weakest that fits is 4, the next 3."""
    ranking = Ranking([5.0, 4.0, 3.0, 2.0, 1.0], 1.5, 2)
    assert ranking.kept == [0, 1]
    assert ranking.distances([0, 1]) == []
    assert ranking.distances([0, 2]) == [1.0, 1.0]  # 2 added below 4, 1 dropped above 3
    assert ranking.distances([1, 4]) == [3.0, 2.0]
    assert ranking.distances([0]) == [2.5]  # there was room, so only the threshold could have kept 1 out
    roomy = Ranking([5.0, 4.0, 3.0, 2.0, 1.0], 3.5, 4)
    assert roomy.kept == [0, 1]
    assert roomy.distances([0, 1, 2]) == [0.5]
    assert roomy.distances([0]) == [0.5]
    assert Ranking([math.inf, 1.0, 0.0], -math.inf, 1).distances([1]) == [math.inf, math.inf]
