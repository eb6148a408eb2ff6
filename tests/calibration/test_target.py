"""Sizes against the size function of plans, and percentages."""

from __future__ import annotations

import pytest

from minicache_trt.calibration.target import Sizes, parse_percent
from minicache_trt.compression.methods import make_plan
from minicache_trt.compression.size import ratio
from minicache_trt.config import ModelConfig
from minicache_trt.contract import compressed_block_bytes
from minicache_trt.errors import UserError

SHAPES = [
    ModelConfig("llama", 4, 64, 64, 4, 2, 64, 100, 4096),
    ModelConfig("mistral", 4, 64, 64, 4, 2, 64, 100, 4096, sliding_window=200),
]


@pytest.mark.parametrize("config", SHAPES)
@pytest.mark.parametrize("context", [128, 500, 1000, 4096])
@pytest.mark.parametrize("method", ["kivi4", "kivi2", "minicache4"])
def test_sizes_are_those_of_plans(config: ModelConfig, context: int, method: str) -> None:
    plan = make_plan(config, method)
    size, sizes = compressed_block_bytes(plan, config, 2), Sizes(config, context, 64)
    expected = ratio(plan, config, context, 64)
    assert sizes.ratio(size) == pytest.approx(expected)
    assert sizes.budget(expected * (1 - 1e-9)) == size and sizes.budget(expected * 1.001) < size
    assert sizes.bits(size) == pytest.approx(8 * size / (2 * 4 * 2 * 64 * 64))


def test_contexts_without_compressed_blocks() -> None:
    with pytest.raises(UserError, match="--context: at 100 tokens nothing is compressed yet"):
        Sizes(SHAPES[0], 100, 64)


def test_percentages() -> None:
    for text, value in {"0.5%": 0.005, " 2 % ": 0.02, "1": 0.01, ".25%": 0.0025, "100%": 1.0}.items():
        assert parse_percent(text, "--max-loss") == pytest.approx(value)
    for text in ("", "%", "-1%", "0%", "0", "101%", "1%%", "one", "1e-3", "nan", "0,5%"):
        with pytest.raises(UserError, match=r"--max-loss: expected a percentage such as 0\.5%"):
            parse_percent(text, "--max-loss")
