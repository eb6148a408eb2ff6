"""The table against every choice there is."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from minicache_trt.calibration import knapsack
from minicache_trt.calibration.knapsack import Option, Table, fewest_bytes

LAYERS = 4


def random_options(seed: int) -> list[Option]:
    rng = np.random.default_rng(seed)
    options = []
    for chain in range(2):
        for size in (1, 2):
            for start in range(LAYERS - size + 1):
                for _ in range(2):
                    options.append(Option(chain, start, size, 16 * int(rng.integers(1, 20)), float(rng.random())))
    return options


def choices(options: list[Option], place: int = 0) -> Iterator[list[Option]]:
    if place == 2 * LAYERS:
        yield []
    for option in options:
        if option.chain * LAYERS + option.start == place:
            for rest in choices(options, place + option.size):
                yield [option, *rest]


@pytest.mark.parametrize("seed", range(4))
def test_both_problems(seed: int) -> None:
    options = random_options(seed)
    totals = [(sum(o.block_bytes for o in c), sum(o.loss for o in c)) for c in choices(options)]
    assert fewest_bytes(options, LAYERS) == min(size for size, _ in totals)
    for budget in (300, 500, 700, 1000):
        found = Table(options, LAYERS, budget).least_loss()
        fitting = [loss for size, loss in totals if size <= budget]
        if not fitting:
            assert found is None
            continue
        assert found is not None
        own = [options[index] for index in found]
        assert sum(o.block_bytes for o in own) <= budget
        assert sum(o.loss for o in own) == pytest.approx(min(fitting))
    for most in (1.0, 2.0, 3.0):
        found = Table(options, LAYERS, 3000).fewest_bytes(most)
        small = [size for size, loss in totals if loss <= most + 1e-12]
        assert (found is None) == (not small)
        if found is not None:
            own = [options[index] for index in found]
            assert sum(o.block_bytes for o in own) == min(small) and sum(o.loss for o in own) <= most + 1e-9


def test_coarse_units_stay_within_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    options = random_options(9)
    exact = Table(options, LAYERS, 800).least_loss()
    monkeypatch.setattr(knapsack, "MOST_UNITS", 20)
    coarse = Table(options, LAYERS, 800).least_loss()
    assert exact is not None and coarse is not None
    assert sum(options[i].block_bytes for i in coarse) <= 800
    assert sum(options[i].loss for i in coarse) >= sum(options[i].loss for i in exact)
