"""Which tokens are retained, against the rules spelled out token by token."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minicache_trt.compression.codec import compress_blocks
from minicache_trt.compression.constants import FIRST_SCORE
from minicache_trt.compression.packing import unpack
from minicache_trt.compression.retention import put_exact, retained_mask, retained_tokens
from minicache_trt.compression.segment import Segment
from minicache_trt.compression.stream import RETAINED_FORMATS, RETENTION_RULES, Stream
from minicache_trt.config import ModelConfig
from minicache_trt.contract import stream_layout

CONFIG = ModelConfig("llama", 4, 64, 64, 4, 2, 64, 100, 4096)


def expected_tokens(stream: Stream, scores: list[np.float32], first_block: bool) -> list[int]:
    meaningful = [score for score in scores if score < FIRST_SCORE]
    low, high = (min(meaningful), max(meaningful)) if meaningful else (np.float32(0), np.float32(0))
    share = np.float32(high - low) * np.float32(stream.gamma)
    candidates = []
    for position, score in enumerate(scores):
        sink = first_block and position < stream.sink_tokens
        if stream.retention == "paper_literal":
            chosen, extremity = score < FIRST_SCORE and bool(meaningful) and score < low + share, -score
        else:
            chosen = stream.retention == "topk" or score >= FIRST_SCORE or score > high - share
            extremity = score
        if sink or chosen:
            candidates.append((not sink, -extremity, position))
    kept = sorted(position for *_, position in sorted(candidates)[: stream.retained])
    return kept + [-1] * (stream.retained - len(kept))


@settings(max_examples=200, deadline=None)
@given(
    rule=st.sampled_from(RETENTION_RULES),
    gamma=st.sampled_from([0.0, 0.05, 0.3, 1.0]),
    retained=st.integers(1, 32),
    sinks=st.integers(0, 32),
    levels=st.integers(1, 40),
    meaningless=st.integers(0, 64),
    seed=st.integers(0, 2**20),
)
def test_rules(rule: str, gamma: float, retained: int, sinks: int, levels: int, meaningless: int, seed: int) -> None:
    stream = Stream(
        "key",
        (0, 1),
        (Segment(64),),
        merge="mean",
        retained=retained,
        retention=rule,
        gamma=gamma,
        sink_tokens=min(sinks, retained),
    )
    rng = np.random.default_rng(seed)
    score = (rng.integers(0, levels, (2, 3, 64)) / levels * 3).astype(np.float32)  # few levels, so many ties
    score[..., rng.permutation(64)[:meaningless]] = FIRST_SCORE
    index = retained_tokens(stream, torch.from_numpy(score), torch.tensor([0, 3]))
    assert index.shape == (2, 3, retained)
    for n in range(2):
        for head in range(3):
            assert index[n, head].tolist() == expected_tokens(stream, list(score[n, head]), n == 0)
    mask = retained_mask(index, 64)
    assert torch.equal(mask.sum(-1), (index >= 0).sum(-1))


@pytest.mark.parametrize("fmt", RETAINED_FORMATS)
@pytest.mark.parametrize("norm", ["head", "token"])
def test_retained_vectors_and_unused_slots(fmt: str, norm: str) -> None:
    torch.manual_seed(0)
    stream = Stream(
        "key",
        (0, 1),
        (Segment(64, "int2"),),
        merge="slerp",
        retained=20,
        retention="threshold",
        gamma=0.25,
        retained_format=fmt,
        norm=norm,
    )
    layout = stream_layout(0, stream, CONFIG)
    x = torch.randn(2, 3, 2, 64, 64)
    fields = compress_blocks(layout, x, torch.arange(3))
    index = fields["retained_index"].expand(-1, 2, -1)
    assert (index < 0).any() and (index >= 0).any()
    unused = (index < 0)[:, None].expand(-1, 2, -1, -1)
    if fmt == "model":
        assert (fields["exact"][unused] == 0).all()
    else:
        assert (unpack(fields["exact"], layout.exact.bits)[unused] == 0).all()
        ranges = fields["exact_params"].unflatten(-1, (-1, 20)).transpose(-1, -2)
        assert (ranges[unused] == 0).all()
    tolerance = {"model": 0.0, "int8": 0.02, "fp8": 0.2, "int4": 0.3}[fmt]
    for member in range(2):
        restored = put_exact(layout, fields, member, torch.full_like(x[0], 99.0))
        chosen = retained_mask(index.long(), 64)
        assert (restored[~chosen] == 99.0).all()
        assert (restored - x[member])[chosen].abs().amax() <= tolerance
