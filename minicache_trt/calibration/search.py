"""The search for a plan: solve the knapsack, measure the streams it chose, solve again, and verify whole plans."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

from minicache_trt.calibration.coded import CodedStream, coded_streams
from minicache_trt.calibration.evaluator import Evaluator, Losses
from minicache_trt.calibration.families import Candidate, Constants, Family, with_sink
from minicache_trt.calibration.knapsack import Option, Table
from minicache_trt.compression.plan import CompressionPlan
from minicache_trt.compression.stream import PARTS
from minicache_trt.config import ModelConfig

LEAST_LOSS = 1e-7
"""Below it a measured divergence is rounding."""
METHOD = "calibrated"
"""Name of the plans that are written."""

Choice = list[Candidate]
"""One candidate for each group of a plan."""


@dataclass(frozen=True)
class Measured:
    """Divergences when one stream alone is compressed, beside the estimate."""

    family: str
    expected: float
    text: float
    recall: float


@dataclass(frozen=True)
class Verified:
    """A whole plan and what it measured: ``expected`` is the sum over its streams."""

    name: str
    plan: CompressionPlan
    block_bytes: int
    expected: float
    losses: Losses


class Search:
    """Candidates of a model, what has been measured of them, and whole plans made of them.

    Parameters
    ----------
    families : sequence of Family
    streams, plans : Evaluator
        For single streams, and for whole plans.
    recall_share : float
    known : dict
        Measurements by candidate key, of an earlier run; new ones are added. They save time and change nothing: only
        what this search has come across counts in `measured`.
    keep : callable
        Called after each measurement.
    progress : callable
        Takes stage, done and total.
    """

    def __init__(
        self, families: Sequence[Family], config: ModelConfig, streams: Evaluator, plans: Evaluator,
        recall_share: float, known: dict[str, Measured], keep: Callable[[], None],
        progress: Callable[[str, int, int], None],
    ) -> None:  # fmt: skip
        self.config, self._known = config, known
        self.measured: dict[str, Measured] = {}
        self._families = {family.name: family for family in families}
        self._streams, self._plans = streams, plans
        self._recall_share = recall_share
        self._keep, self._progress = keep, progress

    def family(self, candidate: Candidate) -> Family:
        """The family a candidate belongs to."""
        stream = candidate.stream
        return self._families[f"{stream.part} {'-'.join(map(str, stream.layers))} {stream.basis}"]

    def _loss(self, candidate: Candidate, family: Family, factors: dict[str, float]) -> float:
        """Measured loss, or the estimate corrected by what was measured of its family, or of its kind."""
        if candidate.key in self.measured:
            return self._mix(self.measured[candidate.key])
        return candidate.expected * factors.get(family.name, factors.get(self._kind(family), 1.0))

    def solve(self, budget: int, merge: bool = True, sinks: Sequence[str] = (), most: float | None = None) -> Choice:
        """The plan of least loss within ``budget`` bytes per block, or the smallest that loses at most ``most``.

        Parameters
        ----------
        merge : bool
            Whether groups of several layers may be chosen.
        sinks : sequence of str
            Parts whose streams retain the first token.

        Returns
        -------
        list of Candidate
            Empty if there is no such plan.
        """
        pairs = self._options(merge, sinks)
        table = Table([option for option, _ in pairs], self.config.num_layers, budget)
        indices = table.least_loss() if most is None else table.fewest_bytes(most)
        return [pairs[index][1] for index in indices or []]

    def measure(self, choice: Choice) -> int:
        """Measure the streams that have not been; returns how many there were."""
        new = [each for each in choice if each.key not in self.measured and each.stream.merge == "linear"]
        for done, candidate in enumerate(new):
            self._progress("streams", done, len(new))
            if candidate.key not in self._known:
                coded = CodedStream.of(candidate.stream, self._constants(candidate), self.config)
                text, recall = self._streams.measure([coded]).divergence
                self._known[candidate.key] = Measured(self.family(candidate).name, candidate.expected, text, recall)
                self._keep()
            self.measured[candidate.key] = self._known[candidate.key]
        if new:
            self._progress("streams", len(new), len(new))
        return len(new)

    def settle(self, solve: Callable[[], Choice], rounds: int, most: float | None = None) -> Choice:
        """Solve and measure until the solution stays within what has been measured, or the rounds are over.

        Returns
        -------
        list of Candidate
            The best choice of all rounds by what its streams measured: the least loss, with ``most`` the smallest one
            that loses at most so much (or the least loss, if all lose more).
        """
        best: tuple[tuple[float, ...], Choice] | None = None
        for _ in range(rounds):
            choice = solve()
            new = self.measure(choice)
            loss, size = self.expected(choice), sum(each.block_bytes for each in choice)
            rank = (loss, size) if most is None else (loss > most, loss if loss > most else size)
            if best is None or rank < best[0]:
                best = rank, choice
            if not new:
                break
        assert best is not None
        return best[1]

    def expected(self, choice: Choice) -> float:
        """Sum of the streams' losses."""
        factors = self._factors()
        return sum(self._loss(each, self.family(each), factors) for each in choice)

    def verify(self, name: str, choice: Choice) -> Verified:
        """Measure the plan made of a choice."""
        size = sum(candidate.block_bytes for candidate in choice)
        expected = self.expected(choice)
        return self.verify_plan(name, self.plan(choice), size, expected)

    def verify_plan(self, name: str, plan: CompressionPlan, size: int, expected: float = math.nan) -> Verified:
        """Measure any plan."""
        return Verified(name, plan, size, expected, self._plans.measure(coded_streams(plan, self.config)))

    def plan(self, choice: Choice) -> CompressionPlan:
        """The plan of a choice, streams in the order of their layers."""
        ordered = sorted(choice, key=lambda each: (each.stream.layers, PARTS.index(each.stream.part)))
        matrices = {
            f"streams.{index}.{name}": value
            for index, candidate in enumerate(ordered)
            for name, value in self._constants(candidate).items()
        }
        return CompressionPlan(METHOD, tuple(each.stream for each in ordered), matrices).validate(self.config)

    def total(self, verified: Verified) -> float:
        """The loss that is optimised."""
        return verified.losses.loss(self._recall_share)

    def _constants(self, candidate: Candidate) -> Constants:
        return self.family(candidate).constants(candidate.stream)

    def _options(self, merge: bool, sinks: Sequence[str]) -> list[tuple[Option, Candidate]]:
        result, factors = [], self._factors()
        for family in self._families.values():
            if len(family.layers) > 1 and not merge:
                continue
            place = PARTS.index(family.part), family.layers[0], len(family.layers)
            for candidate in family.candidates:
                own = with_sink(candidate, self.config) if family.part in sinks else candidate
                result.append((Option(*place, own.block_bytes, self._loss(own, family, factors)), own))
        return result

    def _mix(self, measured: Measured) -> float:
        return max(LEAST_LOSS, (1 - self._recall_share) * measured.text + self._recall_share * measured.recall)

    def _factors(self) -> dict[str, float]:
        """Measured over estimated loss by family, or by part and basis for families nothing is known of; medians."""
        ratios: dict[str, list[float]] = {}
        for each in self.measured.values():
            if each.expected > 0:
                kind = self._kind(self._families[each.family])
                for name in (each.family, kind):
                    ratios.setdefault(name, []).append(self._mix(each) / each.expected)
        return {name: median(values) for name, values in ratios.items()}

    @staticmethod
    def _kind(family: Family) -> str:
        return f"{family.part} {family.basis}"
