"""Where two sides part: the numbers against NumPy, and engines that differ in one known place."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from minicache_trt.compression.plan import CompressionPlan
from minicache_trt.compression.segment import Segment
from minicache_trt.compression.stream import Stream
from minicache_trt.config import ModelConfig
from minicache_trt.engine_directory import read_engine
from minicache_trt.runtime.llm import LLM
from minicache_trt.tracing.divergence import Divergence, diverge
from minicache_trt.tracing.layers import Side, compare_layers, default_tolerance, other_side
from minicache_trt.tracing.points import trace_points
from tests.tracing.conftest import Build
from tests.tracing.record import tokens

PROMPTS = [tokens(100, 1), tokens(30, 2)]


def compare(directory: Path, against: str | Path, max_tokens: int = 40, tolerance: float | None = None) -> Divergence:
    info = read_engine(directory)
    a = Side(directory, info, info.build.backend)
    b = other_side(directory, info, str(against))
    recording = a.record(1)
    llm = LLM.from_engine(recording)
    limit = default_tolerance(a, b) if tolerance is None else tolerance
    return compare_layers(llm, recording, b, PROMPTS, max_tokens, limit, 1, lambda done, total: None)


@pytest.mark.parametrize(
    ("weight", "first"),
    [
        ("model.embed_tokens", "embed"),
        ("model.layers.0.self_attn.q_proj", "layers.0.attention"),
        ("model.layers.2.self_attn.v_proj", "layers.2.attention"),
        ("model.layers.1.input_layernorm", "layers.1.attention"),
        ("model.layers.1.self_attn.o_proj", "layers.1.middle"),
        ("model.layers.2.post_attention_layernorm", "layers.2.output"),
        ("model.layers.3.mlp.down_proj", "layers.3.output"),
        ("model.norm", "logits"),
        ("lm_head", "logits"),
    ],
)
def test_a_changed_weight_is_found(build: Build, perturbed: Callable[[str], Path], weight: str, first: str) -> None:
    result = compare(build("full"), build("full", perturbed(f"{weight}.weight")), 4)
    assert result.first is not None and result.first.point == first
    before = result.points[: [point.point for point in result.points].index(first)]
    assert all(point.relative_error < 1e-5 for point in before)
    if first != "logits":
        # The first token attends to itself alone: no query or key can change what it reads.
        assert result.first_token() == (0, 1 if "q_proj" in weight else 0)


@pytest.mark.parametrize("method", ["full", "kivi4", "minicache"])
def test_an_engine_agrees_with_torch(build: Build, method: str) -> None:
    result = compare(build(method), "torch", tolerance=1e-2)
    assert result.first is None and result.first_token() is None
    assert result.profile.shape == (13, sum(len(prompt) + 40 for prompt in PROMPTS))
    assert result.lengths == ((100, 140), (30, 70))


def test_an_engine_is_itself(build: Build) -> None:
    directory = build("kivi4")
    result = compare(directory, directory, 4)
    assert {point.relative_error for point in result.points} == {0.0}
    assert {round(point.cosine, 12) for point in result.points} == {1.0}


def one_layer(config: ModelConfig) -> CompressionPlan:
    """4-bit keys in layer 2, everything else as it is."""
    exact, coarse = Segment(config.head_dim), Segment(config.head_dim, "int4")
    return CompressionPlan(
        "custom",
        tuple(
            Stream(part, (layer,), (coarse if (part, layer) == ("key", 2) else exact,))
            for part in ("key", "value")
            for layer in range(config.num_layers)
        ),
    )


@pytest.mark.parametrize("other", ["engine", "uncompressed"])
def test_a_compressed_layer_is_found(build: Build, other: str) -> None:
    """Token 128 is the first that reads a compressed block: the window of 64 before it is exact."""
    directory = build(one_layer)
    result = compare(directory, build("full") if other == "engine" else other)
    assert result.first is not None and result.first.point == "layers.2.attention"
    assert result.first_token() == (0, 128)
    assert (result.profile[:, 140:] < 1e-5).all()  # the second prompt never leaves its window


def test_default_tolerance_follows_precision(build: Build) -> None:
    def tolerance(plan: str, weights: str = "fp32") -> float:
        directory = build(plan, weights=weights)
        side = Side(directory, read_engine(directory), "onnxruntime")
        return default_tolerance(side, side)

    assert [tolerance("full"), tolerance("kivi4"), tolerance("kivi2"), tolerance("kivi2", "int8")] == [
        1e-3,
        1e-3,
        1e-2,
        0.1,
    ]


def random_traces(seed: int) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(seed)
    names = ("embed", "layers.0.attention", "layers.0.output", "logits")
    return [{name: rng.standard_normal((n, 7)).astype(np.float32) for name in names} for n in (5, 3)]


def test_numbers_against_numpy() -> None:
    a, b = random_traces(0), random_traces(1)
    for mine, theirs in zip(a, b, strict=True):
        mine["embed"] = theirs["embed"] * np.float32(1 + 1e-4)
    result = diverge(a, b, ((2, 5), (1, 3)), 1e-3)
    for point in result.points:
        x = [float(v) for trace in a for v in trace[point.point].ravel()]
        y = [float(v) for trace in b for v in trace[point.point].ravel()]
        errors = [abs(p - q) for p, q in zip(x, y, strict=True)]
        assert point.max_abs_diff == pytest.approx(max(errors), rel=1e-6)
        assert point.mean_abs_diff == pytest.approx(sum(errors) / len(errors), rel=1e-5)
        assert point.relative_error == pytest.approx(math.hypot(*errors) / math.hypot(*y), rel=1e-6)
        dot = sum(p * q for p, q in zip(x, y, strict=True))
        assert point.cosine == pytest.approx(dot / math.hypot(*x) / math.hypot(*y), abs=1e-9)
        assert point.within == (point.point == "embed")
    assert result.first is not None and result.first.point == "layers.0.attention"
    assert result.first.layer == 0 and result.first_token() == (0, 0)
    token = a[1]["layers.0.output"][1].astype(float), b[1]["layers.0.output"][1].astype(float)
    assert result.profile[2, 6] == pytest.approx(math.dist(*token) / math.hypot(*token[1]), rel=1e-6)


def test_first_token_counts_from_its_prompt() -> None:
    a = random_traces(0)
    b = [{name: array.copy() for name, array in trace.items()} for trace in a]
    b[1]["layers.0.attention"][2] += 1
    result = diverge(a, b, ((2, 5), (1, 3)), 1e-3)
    assert result.first_token() == (1, 2)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_numbers_that_are_not_finite_part(bad: float) -> None:
    a, b = random_traces(0), random_traces(0)
    a[0]["layers.0.output"][3, 2] = bad
    result = diverge(a, b, ((2, 5), (1, 3)), 1e-3)
    assert result.first is not None and result.first.point == "layers.0.output"
    assert result.first_token() == (0, 3)
    json.loads(json.dumps(result.to_dict(), allow_nan=False))


def test_zeros() -> None:
    a, b = random_traces(0), random_traces(0)
    for trace in (*a, *b):
        trace["embed"][:] = 0
    b[0]["layers.0.output"][:] = b[1]["layers.0.output"][:] = 0
    result = diverge(a, b, ((2, 5), (1, 3)), 1e-3)
    assert (result.points[0].relative_error, result.points[0].within) == (0.0, True)
    assert result.points[2].relative_error == math.inf and result.first is result.points[2]


def test_points_are_in_order(build: Build) -> None:
    directory = build("full")
    names = [point.point for point in compare(directory, directory, 2).points]
    assert names == [*trace_points(read_engine(directory).model), "logits"]
