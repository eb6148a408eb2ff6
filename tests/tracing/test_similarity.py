"""Statistics of keys and values against loops over numbers."""

from __future__ import annotations

import math
import statistics as stats

import numpy as np
import pytest

from minicache_trt.compression.methods import MethodOptions, make_plan
from minicache_trt.compression.plan import CompressionPlan
from minicache_trt.config import ModelConfig
from minicache_trt.errors import UserError
from minicache_trt.tracing.recording import check_finite
from minicache_trt.tracing.similarity import BIN_DEGREES, stream_statistics
from tests.support.plans import mixed_plan

HEADS, DIM, LAYERS = 2, 64, 4


@pytest.fixture
def config() -> ModelConfig:
    from minicache_trt.checkpoint import parse_config
    from tests.cli.conftest import CONFIG

    changes = {"num_hidden_layers": LAYERS, "num_key_value_heads": HEADS, "head_dim": DIM}
    return parse_config({**CONFIG, **changes}, path="config.json")


def traces(seed: int = 0) -> list[dict[str, np.ndarray]]:
    """Two prompts whose layers share a direction, more so the deeper they are."""
    rng = np.random.default_rng(seed)
    result = []
    for count in (9, 4):
        shared = rng.standard_normal((count, 2, HEADS, DIM))
        result.append(
            {
                f"kv.{layer}": (layer * shared + rng.standard_normal(shared.shape)).astype(np.float32)
                for layer in range(LAYERS)
            }
        )
    return result


def vectors(data: list[dict[str, np.ndarray]], layer: int, place: int, token: bool) -> list[list[float]]:
    rows = []
    for trace in data:
        for step in trace[f"kv.{layer}"]:
            heads = [[float(x) for x in head] for head in step[place]]
            rows += [[x for head in heads for x in head]] if token else heads
    return rows


def percentile(values: list[float], share: float) -> float:
    """Linear interpolation between order statistics."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


@pytest.mark.parametrize("token", [False, True])
@pytest.mark.parametrize(("place", "part"), [(0, "key"), (1, "value")])
def test_against_loops(config: ModelConfig, token: bool, place: int, part: str) -> None:
    data = traces()
    plan = make_plan(config, "minicache", MethodOptions(merge_start=2, norm="token" if token else "head"))
    result = stream_statistics(data, plan, LAYERS)
    assert (result.tokens, result.granularity[part]) == (13, "token" if token else "head")
    norms, pairs = result.of(part)
    assert [row.layer for row in norms] == list(range(LAYERS))
    for row in norms:
        expected = [math.hypot(*vector) for vector in vectors(data, row.layer, place, token)]
        assert row.norm.mean == pytest.approx(stats.fmean(expected))
        assert row.norm.p10 == pytest.approx(percentile(expected, 0.1))
        assert row.norm.p50 == pytest.approx(stats.median(expected))
        assert row.norm.p90 == pytest.approx(percentile(expected, 0.9))
    assert [(pair.layers, pair.merged) for pair in pairs] == [((0, 1), False), ((1, 2), False), ((2, 3), True)]
    for pair in pairs:
        cosines = [
            sum(x * y for x, y in zip(a, b, strict=True)) / math.hypot(*a) / math.hypot(*b)
            for a, b in zip(*(vectors(data, layer, place, token) for layer in pair.layers), strict=True)
        ]
        angles = [math.degrees(math.acos(cosine)) for cosine in cosines]
        assert pair.cosine.mean == pytest.approx(stats.fmean(cosines))
        assert pair.cosine.p10 == pytest.approx(percentile(cosines, 0.1))
        assert pair.angle.p90 == pytest.approx(percentile(angles, 0.9))
        histogram = [0] * (180 // BIN_DEGREES)
        for angle in angles:
            histogram[int(angle / BIN_DEGREES)] += 1
        assert list(pair.histogram) == histogram
    assert pairs[0].cosine.mean < pairs[1].cosine.mean < pairs[2].cosine.mean


def test_distant_layers_that_are_merged(config: ModelConfig) -> None:
    result = stream_statistics(traces(), mixed_plan(config), LAYERS)
    _, keys = result.of("key")
    _, values = result.of("value")
    assert [pair.layers for pair in keys if pair.merged] == [(0, 3)]
    assert [pair.layers for pair in keys] == [(0, 1), (0, 3), (1, 2), (2, 3)]
    assert [pair.layers for pair in values if pair.merged] == [(0, 1), (2, 3)]
    assert result.granularity == {"key": "head", "value": "token"}


def test_known_angles() -> None:
    """Orthogonal, opposite and equal directions, and a vector of zeros."""
    directions = np.array([[1, 0], [0, 2], [-3, 0], [0, 0]], np.float32)
    base = np.tile(np.array([1, 0], np.float32), (4, 1))
    data = [
        {"kv.0": np.tile(base[:, None, None], (1, 2, 1, 1)), "kv.1": np.tile(directions[:, None, None], (1, 2, 1, 1))}
    ]
    result = stream_statistics(data, CompressionPlan("full"), 2)
    (pair,) = result.of("key")[1]
    assert not pair.merged
    assert pair.cosine.mean == pytest.approx((1 + 0 - 1 + 0) / 4)
    assert pair.angle.mean == pytest.approx((0 + 90 + 180 + 90) / 4)
    assert (pair.histogram[0], pair.histogram[90 // BIN_DEGREES], pair.histogram[-1]) == (1, 2, 1)


def test_numbers_that_are_not_finite() -> None:
    data = traces()[0]
    data["kv.2"][3] = np.nan
    with pytest.raises(UserError, match=r"kv.2 holds numbers that are not finite"):
        check_finite(data)
