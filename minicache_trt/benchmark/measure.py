"""Every cell of batch sizes and contexts, measured for all contenders in turn."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np

from minicache_trt.benchmark.memory import PeakMemory
from minicache_trt.benchmark.timings import Ratio, Timings, alternate
from minicache_trt.config import BuildConfig, ModelConfig
from minicache_trt.errors import UserError

PERCENTILES = (50, 90, 99)

Progress = Callable[[int, int], None]
"""Runs done, of how many."""


class Contender(Protocol):
    """Something that generates, in a process with a number."""

    name: str
    pid: int

    def run(self, prompts: Sequence[list[int]], new_tokens: int) -> Timings: ...

    def cache_bytes(self) -> tuple[int, int] | None: ...


@dataclass(frozen=True)
class Grid:
    """What is measured.

    Parameters
    ----------
    batch_sizes, contexts : tuple of int
        Prompts at a time, and tokens of each; every combination is a cell.
    new_tokens : int
        Tokens generated after each prompt; the first one is prefill's.
    rounds : int
        Measurements of each contender in a cell, after one that warms up.
    """

    batch_sizes: tuple[int, ...] = (1, 8)
    contexts: tuple[int, ...] = (16, 512)
    new_tokens: int = 32
    rounds: int = 3

    def __post_init__(self) -> None:
        for name in ("batch_sizes", "contexts"):
            values = getattr(self, name)
            if not values or min(values) < 1:
                raise ValueError(f"{name}: expected positive numbers, got {values}")
        for name, least in (("new_tokens", 2), ("rounds", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: expected at least {least}, got {getattr(self, name)}")

    @property
    def length(self) -> int:
        """Tokens of the longest sequence."""
        return max(self.contexts) + self.new_tokens

    @property
    def cells(self) -> list[tuple[int, int]]:
        """Batch size and context of each cell."""
        return [(batch, context) for batch in self.batch_sizes for context in self.contexts]

    def check(self, build: BuildConfig) -> None:
        """Whether an engine can run every cell.

        Raises
        ------
        UserError
        """
        if max(self.batch_sizes) > build.max_batch_size:
            raise UserError(
                f"--batch-sizes: {max(self.batch_sizes)} is beyond the engine's max_batch_size {build.max_batch_size}",
                "lower it, or build the engine with a larger --max-batch-size",
            )
        if self.length > build.max_seq_len:
            raise UserError(
                f"--contexts: {max(self.contexts)} tokens and {self.new_tokens} new ones are beyond the engine's "
                f"max_seq_len {build.max_seq_len}",
                "lower --contexts or --new-tokens, or build the engine with a larger --max-seq-len",
            )


@dataclass(frozen=True)
class Figures:
    """One contender in one cell: a number per round, percentiles over all steps of all rounds.

    Parameters
    ----------
    prefill_tokens_per_second, decode_tokens_per_second : list of float
        See `Timings`.
    time_to_first_token : list of float
        Seconds.
    inter_token_latency : dict
        Seconds; keys ``p50``, ``p90``, ``p99``.
    decode_steps : int
        Steps behind these percentiles.
    peak_bytes : int, optional
        Most resident memory of the contender's process during the cell, weights included; None where the system does
        not tell.
    cache_bytes_used, cache_bytes_allocated : int, optional
        None for peers.
    """

    prefill_tokens_per_second: list[float]
    time_to_first_token: list[float]
    decode_tokens_per_second: list[float]
    inter_token_latency: dict[str, float]
    decode_steps: int
    peak_bytes: int | None
    cache_bytes_used: int | None
    cache_bytes_allocated: int | None

    @classmethod
    def of(cls, runs: Sequence[Timings], context: int, peak: int | None, cache: tuple[int, int] | None) -> Figures:
        steps = [seconds for run in runs for seconds in run.steps]
        latencies = {f"p{q}": float(np.percentile(steps, q)) for q in PERCENTILES}
        return cls(
            [run.prefill_rate(context) for run in runs],
            [run.time_to_first_token for run in runs],
            [run.decode_rate for run in runs],
            latencies,
            len(steps),
            peak,
            *(cache or (None, None)),
        )


@dataclass(frozen=True)
class Cell:
    """One batch size and context: figures by contender, and what the first contender has over the second, if any.

    ``ratios`` has the keys ``prefill`` and ``decode``; ``same_tokens`` is the share of generated tokens in which the
    two agree.
    """

    batch: int
    context: int
    figures: dict[str, Figures]
    ratios: dict[str, Ratio]
    same_tokens: float | None


def random_prompts(
    model: ModelConfig, count: int, context: int, reserved: frozenset[int] = frozenset(), seed: int = 0
) -> list[list[int]]:
    """``count`` prompts of ``context`` tokens without special ones."""
    special = [token for token in (*model.eos_token_ids, *reserved, model.bos_token_id) if token is not None]
    ids = np.setdiff1d(np.arange(model.vocab_size), np.array(special, np.int64))
    prompts: list[list[int]] = np.random.default_rng(seed).choice(ids, (count, context)).tolist()
    return prompts


def measure(
    contenders: Sequence[Contender], grid: Grid, prompts: list[list[int]], progress: Progress
) -> Iterator[Cell]:
    """Measure cell after cell.

    Parameters
    ----------
    contenders : sequence of Contender
        Ours, and a peer if there is one.
    grid : Grid
    prompts : list of list of int
        At least as many and as long as the largest cell needs.
    progress : callable

    Raises
    ------
    UserError
        A contender cannot run a cell.
    """
    total = len(grid.cells) * (grid.rounds + 1) * len(contenders)
    done = 0

    def once(contender: Contender, some: list[list[int]]) -> Timings:
        nonlocal done
        gc.collect()  # garbage of what ran before is not this contender's
        timings = contender.run(some, grid.new_tokens)
        done += 1
        progress(done, total)
        return timings

    for batch, context in grid.cells:
        some = [prompt[:context] for prompt in prompts[:batch]]
        memory = {contender.name: PeakMemory(contender.pid) for contender in contenders}
        for contender in contenders:
            memory[contender.name].reset()
            once(contender, some)
        runs = alternate({contender.name: partial(once, contender, some) for contender in contenders}, grid.rounds)
        figures = {
            contender.name: Figures.of(
                runs[contender.name], context, memory[contender.name].read(), contender.cache_bytes()
            )
            for contender in contenders
        }
        yield Cell(batch, context, figures, *_compare(list(figures.values()), list(runs.values())))


def _compare(figures: list[Figures], runs: list[list[Timings]]) -> tuple[dict[str, Ratio], float | None]:
    if len(figures) < 2:
        return {}, None
    ours, theirs = figures[:2]
    ratios = {
        "prefill": Ratio.of(ours.prefill_tokens_per_second, theirs.prefill_tokens_per_second),
        "decode": Ratio.of(ours.decode_tokens_per_second, theirs.decode_tokens_per_second),
    }
    return ratios, same_tokens(runs[0][-1].tokens, runs[1][-1].tokens)


def same_tokens(mine: Any, theirs: Any) -> float:
    """Share of positions with the same token."""
    return float((np.array(mine) == np.array(theirs)).mean())
