"""What one run took, and how runs of several contenders are put in turn and compared."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeVar

Sample = TypeVar("Sample")


@dataclass(frozen=True)
class Timings:
    """One run: a batch of prompts, and the same number of tokens generated after each.

    Parameters
    ----------
    first_tokens : tuple of float
        Seconds from the submission of all prompts to the first token of each.
    steps : tuple of float
        Seconds of each decode step that had all sequences: the inter-token latencies of every one of them. Steps that
        prefill other sequences are not among them.
    tokens : tuple of tuples of int
        The generated tokens of each sequence.
    """

    first_tokens: tuple[float, ...]
    steps: tuple[float, ...]
    tokens: tuple[tuple[int, ...], ...] = ()

    @classmethod
    def from_events(
        cls,
        start: float,
        events: Sequence[tuple[Hashable, float]],
        batch: int,
        tokens: tuple[tuple[int, ...], ...] = (),
    ) -> Timings:
        """Recover steps from ``(sequence, time)`` of every token, in the order they came.

        A sequence gets at most one token in a step, so one that comes again opens the next step. ``start`` is the time
        the ``batch`` prompts were submitted.
        """
        rounds: list[list[Hashable]] = []
        ends: list[float] = []
        first_tokens: dict[Hashable, float] = {}
        for sequence, stamp in events:
            if not rounds or sequence in rounds[-1]:
                rounds.append([])
                ends.append(stamp)
            rounds[-1].append(sequence)
            ends[-1] = stamp
            first_tokens.setdefault(sequence, stamp - start)
        counts: Counter[Hashable] = Counter()
        steps = []
        for index, members in enumerate(rounds):
            if len(members) == batch and all(counts[sequence] for sequence in members):
                steps.append(ends[index] - ends[index - 1])
            counts.update(members)
        return cls(tuple(first_tokens.values()), tuple(steps), tokens)

    @classmethod
    def from_stamps(
        cls, start: float, stamps: Sequence[float], batch: int, tokens: tuple[tuple[int, ...], ...] = ()
    ) -> Timings:
        """From the time of each step when all sequences run together; the first step prefills."""
        steps = tuple(after - before for before, after in pairwise(stamps))
        return cls((stamps[0] - start,) * batch, steps, tokens)

    @property
    def time_to_first_token(self) -> float:
        """Seconds; median over the sequences."""
        return statistics.median(self.first_tokens)

    def prefill_rate(self, context: int) -> float:
        """Prompt tokens per second, until the last sequence has its first token."""
        return len(self.first_tokens) * context / max(self.first_tokens)

    @property
    def decode_rate(self) -> float:
        """Generated tokens per second in the steps that had all sequences."""
        return len(self.first_tokens) * len(self.steps) / sum(self.steps)


@dataclass(frozen=True)
class Ratio:
    """Quotient of two contenders: median over rounds of the quotient within a round, and its range."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, numerator: Sequence[float], denominator: Sequence[float]) -> Ratio:
        ratios = [a / b for a, b in zip(numerator, denominator, strict=True)]
        return cls(statistics.median(ratios), min(ratios), max(ratios))

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f}-{self.high:.2f})"


def alternate(
    contenders: Mapping[str, Callable[[], Sample]],
    rounds: int,
    report: Callable[[int, dict[str, list[Sample]]], None] | None = None,
) -> dict[str, list[Sample]]:
    """Measure contenders in turn, A B C A B C ..., so that a busy moment of the machine meets them alike.

    Parameters
    ----------
    contenders : mapping of str to callable
        Each call is one measurement.
    rounds : int
    report : callable, optional
        Called after each round with the number of rounds done and all samples.

    Returns
    -------
    dict of str to list
        What each contender returned, one sample per round.
    """
    samples: dict[str, list[Sample]] = {name: [] for name in contenders}
    for done in range(1, rounds + 1):
        for name, measure in contenders.items():
            samples[name].append(measure())
        if report is not None:
            report(done, samples)
    return samples
