"""The whole calibration: samples, moments, search, verification."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from minicache_trt.calibration.collect import collect, first_moments
from minicache_trt.calibration.evaluator import Evaluator, Losses
from minicache_trt.calibration.families import families, smallest_block_bytes
from minicache_trt.calibration.model import CalibrationModel
from minicache_trt.calibration.moments import Moments
from minicache_trt.calibration.samples import Samples, SampleSets, sample_sets, text_hash
from minicache_trt.calibration.search import Choice, Search, Verified
from minicache_trt.calibration.settings import CalibrationSettings
from minicache_trt.calibration.similarity import Similarities, similarities
from minicache_trt.calibration.state import State, fingerprint
from minicache_trt.calibration.target import Sizes
from minicache_trt.checkpoint import Checkpoint
from minicache_trt.compression.methods import make_plan
from minicache_trt.compression.size import BASELINE_BYTES
from minicache_trt.config import ModelConfig
from minicache_trt.contract import compressed_block_bytes, full_block_bytes
from minicache_trt.errors import UserError
from minicache_trt.runtime.tokenizer import load_tokenizer

BASELINES = ("kivi4", "kivi2")
"""Methods whose loss is measured beside the plan's."""
FRONT_RATIOS = (2.0, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0, 12.0, 16.0)
"""Where the front of expected loss against size is drawn."""
KEEP_EVERY = 8
"""Batches between two writes of partial sums."""
LOSS_STEPS = 4
"""Corrections of the loss that is asked of the sum, until the whole plan keeps its budget."""

MARGIN = 0.05
"""Differences between plans that are taken for noise."""

Report = Callable[[str, int, int], None]


@dataclass(frozen=True)
class FrontPoint:
    """The best plan of one size, by the sum of its streams' losses."""

    ratio: float
    bits: float
    expected: float


@dataclass(frozen=True)
class Calibration:
    """Everything a calibration found out.

    Parameters
    ----------
    chosen : Verified
        The plan.
    choice : list of Candidate
        Its streams (empty when a named method was better).
    tried, baselines : tuple of Verified
        Other plans that were measured whole.
    uncompressed : Losses
        Of the model itself, on the sequences the plans were verified on.
    front : tuple of FrontPoint
    state : State
        To be removed once everything is written.
    """

    chosen: Verified
    choice: Choice
    tried: tuple[Verified, ...]
    baselines: tuple[Verified, ...]
    uncompressed: Losses
    front: tuple[FrontPoint, ...]
    similarities: Similarities | None
    search: Search
    sizes: Sizes
    state: State
    text_hash: str
    checksum: str


def calibrate(
    checkpoint: Checkpoint, text: Path, output: Path, context: int, settings: CalibrationSettings,
    target_ratio: float | None, max_loss: float | None, report: Report,
) -> Calibration:  # fmt: skip
    """Find the plan of least loss at a ratio, or the smallest that loses at most so much.

    Parameters
    ----------
    checkpoint : Checkpoint
        With its tokenizer.
    text : Path
        UTF-8, documents separated by newline and NUL.
    output : Path
        Where plan.json is going to be; partial results are kept beside it.
    context : int
        Tokens at which the ratio counts, and positions keys after RoPE are averaged over.
    target_ratio, max_loss : float, optional
        One of the two; ``max_loss`` is a divergence in nats.

    Raises
    ------
    UserError
        Text, tokenizer or model cannot be used, or the ratio cannot be reached.
    """
    config = checkpoint.config.for_context(context)
    _check_layers(config)
    sizes = Sizes(config, context, settings.window)
    if target_ratio is not None:
        _check_ratio(target_ratio, sizes, settings)
    tokenizer = load_tokenizer(checkpoint.directory)
    if tokenizer is None:
        raise UserError(
            f"{checkpoint.directory}: no tokenizer, so there are no tokens of {text} to calibrate on",
            "put tokenizer.json beside config.json",
        )
    checksum, digest = checkpoint.checksum(), text_hash(text)
    state = State(output, fingerprint(checksum, digest, settings, context))
    sets = sample_sets(text, tokenizer, config, settings)
    model = CalibrationModel(checkpoint.directory, config)
    moments = _moments(model, sets, settings, state, report)
    alike = similarities(model, sets.search, moments) if config.num_layers > 1 else None
    report("reference", 0, 1)
    streams, plans = (Evaluator(model, each, settings.window) for each in (sets.search, sets.verify))
    report("reference", 1, 1)
    found = list(families(moments, config, settings, context))
    search = Search(found, config, streams, plans, settings.recall_share, state.measured, state.save_measured, report)
    chosen, choice, tried, baselines = _Chooser(search, sizes, settings, report).choose(target_ratio, max_loss)
    chosen = replace(chosen, plan=replace(chosen.plan, calibrated_on=checksum))
    front = _front(search, sizes)
    return Calibration(
        chosen, choice, tried, baselines, plans.uncompressed, front, alike, search, sizes, state, digest, checksum
    )


def _check_layers(config: ModelConfig) -> None:
    alike = len({config.at_layer(layer) for layer in range(config.num_layers)}) == 1
    if not alike or config.attention_softcap is not None or config.logit_softcap is not None:
        what = "layers differ in their windows or RoPE" if not alike else "logits are soft-capped"
        raise UserError(
            f"calibration of a {config.family} model whose {what} is not supported yet",
            "choose a method instead, such as --method kivi4",
        )


def _check_ratio(ratio: float, sizes: Sizes, settings: CalibrationSettings) -> None:
    budget, smallest = sizes.budget(ratio), smallest_block_bytes(sizes.config, settings)
    if budget <= 0:
        raise UserError(
            f"--target-ratio: {ratio:g}x cannot be reached: at {sizes.context} tokens the exact window alone allows "
            f"less than {sizes.ratio(0):.2f}x",
            "ask for less, or for a longer --context",
        )
    if smallest > budget:
        raise UserError(
            f"--target-ratio: {ratio:g}x cannot be reached at {sizes.context} tokens: the smallest plan of this model "
            f"is {sizes.ratio(smallest):.2f}x",
            "ask for less, for a longer --context or for larger --groups",
        )


def _moments(
    model: CalibrationModel, sets: SampleSets, settings: CalibrationSettings, state: State, report: Report
) -> Moments:
    moments = state.load()
    if moments is None:
        moments = first_moments(model, sets.moments, max(2, *settings.group_sizes))
    calls = 0

    def keep(sums: Moments, done: int) -> None:
        nonlocal calls
        calls += 1
        if calls % KEEP_EVERY == 0 or done == len(sets.moments):
            state.save_moments(sums, done)

    return collect(
        model, sets.moments, sets.gradients, token_weights(sets.moments, settings.recall_share),
        settings.window, moments, state.done, keep, lambda done, total: report("moments", done, total),
    )  # fmt: skip


def token_weights(samples: Samples, recall_share: float) -> NDArray[np.float64]:
    """Weight of a token of each sequence, so that recall has its share whatever the number of its sequences."""
    share = samples.recall.mean()
    if not 0 < share < 1:
        return np.ones(len(samples))
    weights: NDArray[np.float64] = np.where(samples.recall, recall_share / share, (1 - recall_share) / (1 - share))
    return weights


def _front(search: Search, sizes: Sizes) -> tuple[FrontPoint, ...]:
    points = []
    for ratio in FRONT_RATIOS:
        budget = sizes.budget(ratio)
        choice = search.solve(budget) if budget > 0 else []
        if choice:
            size = sum(each.block_bytes for each in choice)
            expected = search.expected(choice)
            points.append(FrontPoint(sizes.ratio(size), sizes.bits(size), expected))
    return tuple(points)


class _Chooser:
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
