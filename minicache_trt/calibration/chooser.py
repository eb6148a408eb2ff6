"""Whole plans and the choice among them, by what they measure."""

from __future__ import annotations

import math
from collections.abc import Callable

from minicache_trt.calibration.search import Choice, Search, Verified
from minicache_trt.calibration.settings import CalibrationSettings
from minicache_trt.calibration.target import Sizes
from minicache_trt.compression.methods import make_plan
from minicache_trt.compression.size import BASELINE_BYTES
from minicache_trt.contract import compressed_block_bytes, full_block_bytes

BASELINES = ("kivi4", "kivi2")
"""Methods whose loss is measured beside the plan's."""
LOSS_STEPS = 4
"""Corrections of the loss that is asked of the sum, until the whole plan keeps its budget."""
MARGIN = 0.05
"""Differences between plans that are taken for noise."""

Report = Callable[[str, int, int], None]


class Chooser:
    """Chooses among whole plans by what they measure."""

    def __init__(self, search: Search, sizes: Sizes, settings: CalibrationSettings, report: Report) -> None:
        self._search, self._sizes, self._settings, self._report = search, sizes, settings, report

    def choose(
        self, target_ratio: float | None, max_loss: float | None
    ) -> tuple[Verified, Choice, tuple[Verified, ...], tuple[Verified, ...]]:
        """The chosen plan, its streams, the other plans tried, and the baselines."""
        baselines = tuple(self._baseline(name) for name in BASELINES)
        if target_ratio is not None:
            tried = self._within(self._sizes.budget(target_ratio), baselines)
        else:
            assert max_loss is not None
            tried = self._losing(max_loss)
        best = self._best(tried) if target_ratio is not None else tried[0]
        self._search.measure(best[1])  # a variant's streams need not be those of the search
        return best[0], best[1], tuple(row[0] for row in tried if row is not best), baselines

    def _best(self, tried: list[tuple[Verified, Choice]]) -> tuple[Verified, Choice]:
        """The least loss; a later one has to be better by more than `MARGIN`."""
        best = tried[0]
        for row in tried[1:]:
            if self._search.total(row[0]) < (1 - MARGIN) * self._search.total(best[0]):
                best = row
        return best

    def _baseline(self, name: str) -> Verified:
        config = self._search.config
        plan = make_plan(config, name)
        return self._search.verify_plan(name, plan, compressed_block_bytes(plan, config, BASELINE_BYTES))

    def _within(self, budget: int, baselines: tuple[Verified, ...]) -> list[tuple[Verified, Choice]]:
        """Plans within a budget: the search's, those without merging and with sinks, and baselines that fit."""
        search, rounds = self._search, self._settings.rounds
        first = search.settle(lambda: search.solve(budget), rounds)
        tried = [(search.verify("chosen by the search", first), first)]
        variants: dict[str, Callable[[], Choice]] = {
            "without merging": lambda: search.solve(budget, merge=False),
            "first token of keys kept": lambda: search.solve(budget, sinks=("key",)),
        }
        for done, (name, solve) in enumerate(variants.items()):
            self._report("whole plans", done, len(variants))
            choice = solve()
            if choice:
                tried.append((search.verify(name, choice), choice))
        self._report("whole plans", len(variants), len(variants))
        return tried + [(each, []) for each in baselines if each.block_bytes <= budget]

    def _losing(self, most: float) -> list[tuple[Verified, Choice]]:
        """The smallest plan whose measured loss is at most ``most`` first, then the others tried."""
        search, rounds = self._search, self._settings.rounds
        largest = full_block_bytes(search.config, BASELINE_BYTES)
        asked, tried = most, []
        for step in range(LOSS_STEPS):
            self._report("whole plans", step, LOSS_STEPS)
            choice = search.settle(lambda: search.solve(largest, most=asked), rounds, asked)  # noqa: B023
            tried.append((search.verify(f"expected to lose {math.expm1(asked):.2%}", choice), choice))
            loss = max(search.total(tried[-1][0]), 1e-9)
            asked *= min(2.0, 0.98 * most / loss)
        exact = search.solve(largest, most=0.0)
        tried.append((search.verify("uncompressed", exact), exact))
        self._report("whole plans", LOSS_STEPS, LOSS_STEPS)
        kept = [row for row in tried if search.total(row[0]) <= most]
        best = min(kept, key=lambda row: row[0].block_bytes)
        return [best, *(row for row in tried if row is not best)]
