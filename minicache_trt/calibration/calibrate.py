"""The whole calibration: samples, moments, search, verification."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from minicache_trt.calibration.chooser import Chooser
from minicache_trt.calibration.collect import collect, first_moments
from minicache_trt.calibration.evaluator import Evaluator
from minicache_trt.calibration.families import families, smallest_block_bytes
from minicache_trt.calibration.model import CalibrationModel
from minicache_trt.calibration.moments import Moments
from minicache_trt.calibration.result import Calibration, front
from minicache_trt.calibration.samples import Samples, SampleSets, sample_sets, text_hash
from minicache_trt.calibration.search import Search
from minicache_trt.calibration.settings import CalibrationSettings
from minicache_trt.calibration.similarity import similarities
from minicache_trt.calibration.state import State, fingerprint
from minicache_trt.calibration.target import Sizes
from minicache_trt.checkpoint import Checkpoint
from minicache_trt.errors import UserError
from minicache_trt.runtime.tokenizer import load_tokenizer

KEEP_EVERY = 8
"""Batches between two writes of partial sums."""

Report = Callable[[str, int, int], None]


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
    chosen, choice, tried, baselines = Chooser(search, sizes, settings, report).choose(target_ratio, max_loss)
    chosen = replace(chosen, plan=replace(chosen.plan, calibrated_on=checksum))
    return Calibration(
        chosen,
        choice,
        tried,
        baselines,
        plans.uncompressed,
        front(search, sizes),
        alike,
        search,
        sizes,
        state,
        digest,
        checksum,
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
