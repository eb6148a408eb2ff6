"""Cells from contenders whose timings are known."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest

from minicache_trt.benchmark.measure import Figures, Grid, measure, random_prompts
from minicache_trt.benchmark.timings import Timings
from minicache_trt.config import BuildConfig, ModelConfig
from minicache_trt.errors import UserError

MODEL = ModelConfig("llama", 2, 64, 96, 4, 2, 16, vocab_size=40, max_position_embeddings=512, eos_token_ids=(1, 3))


@dataclass
class Scripted:
    """Each run takes a known time; the log says who ran what."""

    name: str
    log: list[tuple[str, int, int]]
    seconds: float
    cache: tuple[int, int] | None = None
    pid: int = field(default_factory=os.getpid)

    def run(self, prompts: Sequence[list[int]], new_tokens: int) -> Timings:
        self.log.append((self.name, len(prompts), len(prompts[0])))
        steps = tuple(self.seconds * (step + 1) for step in range(new_tokens - 1))
        return Timings((self.seconds,) * len(prompts), steps, ((5,) * new_tokens,) * len(prompts))

    def cache_bytes(self) -> tuple[int, int] | None:
        return self.cache


def rank_percentile(values: list[float], q: float) -> float:
    """Linear between the two nearest ranks, from the definition."""
    ordered = sorted(values)
    place = q / 100 * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def test_cells() -> None:
    log: list[tuple[str, int, int]] = []
    progress: list[tuple[int, int]] = []
    grid = Grid((1, 2), (4, 8), new_tokens=6, rounds=2)
    ours, theirs = Scripted("ours", log, 0.5, (10, 20)), Scripted("theirs", log, 2.0)
    prompts = random_prompts(MODEL, 2, 8)
    cells = list(measure([ours, theirs], grid, prompts, lambda done, total: progress.append((done, total))))
    assert [(cell.batch, cell.context) for cell in cells] == [(1, 4), (1, 8), (2, 4), (2, 8)]
    # One warm-up each, then A B A B.
    assert log == [(name, cell.batch, cell.context) for cell in cells for _ in range(3) for name in ("ours", "theirs")]
    assert progress == [(done + 1, 24) for done in range(24)]
    cell = cells[-1]
    figures = cell.figures["ours"]
    assert figures.prefill_tokens_per_second == [2 * 8 / 0.5] * 2
    assert figures.decode_tokens_per_second == pytest.approx([2 * 5 / (0.5 * 15)] * 2)
    assert figures.time_to_first_token == [0.5] * 2 and figures.decode_steps == 10
    assert (figures.cache_bytes_used, figures.cache_bytes_allocated) == (10, 20)
    assert cell.figures["theirs"].cache_bytes_used is None
    assert cell.ratios["decode"].median == pytest.approx(4) and cell.ratios["prefill"].high == pytest.approx(4)
    assert cell.same_tokens == 1.0


def test_alone() -> None:
    (cell,) = measure([Scripted("ours", [], 1.0)], Grid((1,), (4,), 2, 1), random_prompts(MODEL, 1, 4), lambda *_: None)
    assert cell.ratios == {} and cell.same_tokens is None


def test_percentiles_are_over_all_steps_of_all_rounds() -> None:
    rng = np.random.default_rng(0)
    runs = [Timings((1.0,), tuple(rng.random(17).tolist())) for _ in range(3)]
    steps = [seconds for run in runs for seconds in run.steps]
    figures = Figures.of(runs, 4, None, None)
    assert figures.decode_steps == 51
    for q in (50, 90, 99):
        assert figures.inter_token_latency[f"p{q}"] == pytest.approx(rank_percentile(steps, q))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((), (4,), 2, 1), "batch_sizes"),
        (((1,), (0,), 2, 1), "contexts"),
        (((1,), (4,), 1, 1), "new_tokens: expected at least 2, got 1"),
        (((1,), (4,), 2, 0), "rounds: expected at least 1, got 0"),
    ],
)
def test_grids_that_are_refused(arguments: tuple[tuple[int, ...], tuple[int, ...], int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Grid(*arguments)


def test_grid_beyond_the_engine() -> None:
    build = BuildConfig(max_batch_size=2, max_seq_len=64)
    Grid((2,), (60,), 4).check(build)
    with pytest.raises(UserError, match="max_batch_size 2"):
        Grid((1, 3), (60,), 4).check(build)
    with pytest.raises(UserError, match="max_seq_len 64"):
        Grid((2,), (16, 61), 4).check(build)


def test_random_prompts() -> None:
    prompts = random_prompts(MODEL, 3, 500, frozenset({0, 39}))
    assert [len(prompt) for prompt in prompts] == [500] * 3
    assert {token for prompt in prompts for token in prompt} == set(range(40)) - {0, 1, 3, 39}
    assert prompts == random_prompts(MODEL, 3, 500, frozenset({0, 39}))
    assert prompts != random_prompts(MODEL, 3, 500, frozenset({0, 39}), seed=1)
