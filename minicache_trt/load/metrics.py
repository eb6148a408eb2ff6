"""What the records of one point say."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from minicache_trt.load.loads import Load
from minicache_trt.load.record import Record
from minicache_trt.load.slo import Slo

PERCENTILES = (50, 90, 95, 99)
METRICS = {
    "ttft": "time to first token",
    "tpot": "time per output token after the first",
    "itl": "inter-token latency",
    "e2el": "end-to-end latency",
}


@dataclass(frozen=True)
class Distribution:
    """Milliseconds.

    Parameters
    ----------
    mean : float
    percentiles : tuple of (int, float)
        Linear between the two nearest samples.
    """

    mean: float
    percentiles: tuple[tuple[int, float], ...]

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Distribution | None:
        """None without samples."""
        if not seconds:
            return None
        values = np.percentile(np.array(seconds) * 1000, PERCENTILES).tolist()
        return cls(statistics.fmean(seconds) * 1000, tuple(zip(PERCENTILES, values, strict=True)))


@dataclass(frozen=True)
class Point:
    """One load and what came of it.

    Throughput and latencies are those of requests that ended well; the duration is from the start to the end of the
    last request.

    Parameters
    ----------
    load : Load
    records : tuple of Record
    duration : float
        Seconds.
    latencies : dict of str to Distribution
        By the keys of `METRICS`; None without samples. ``itl`` pools the pieces of all requests.
    errors : dict of str to int
        Failed requests by kind.
    good : int, optional
        Requests within the objectives; None without objectives.
    """

    load: Load
    records: tuple[Record, ...]
    duration: float
    latencies: dict[str, Distribution | None]
    errors: dict[str, int]
    good: int | None

    @property
    def ok(self) -> list[Record]:
        return [record for record in self.records if record.error is None]

    @property
    def input_tokens(self) -> int:
        return sum(record.input_tokens or 0 for record in self.ok)

    @property
    def output_tokens(self) -> int:
        return sum(record.output_tokens for record in self.ok)

    def per_second(self, count: float) -> float:
        return count / self.duration if self.duration > 0 else 0.0

    @property
    def peak_concurrency(self) -> int:
        """Most requests that were under way at once."""
        changes = sorted(
            [(record.sent, 1) for record in self.records] + [(record.finished, -1) for record in self.records]
        )
        level = peak = 0
        for _, change in changes:
            level += change
            peak = max(peak, level)
        return peak

    @property
    def max_delay(self) -> float:
        """Longest time a request was held back in the generator, in seconds."""
        return max(record.sent - record.due for record in self.records)

    def to_json(self) -> dict[str, Any]:
        """Flat, with the names of vLLM's result files."""
        rate = self.load.request_rate
        row: dict[str, Any] = {
            "max_concurrency": self.load.max_concurrency,
            "request_rate": "inf" if rate == float("inf") else rate,
            "burstiness": self.load.burstiness,
            "duration": self.duration,
            "num_prompts": len(self.records),
            "completed": len(self.ok),
            "failed": len(self.records) - len(self.ok),
            "errors": self.errors,
            "total_input_tokens": self.input_tokens,
            "total_output_tokens": self.output_tokens,
            "request_throughput": self.per_second(len(self.ok)),
            "output_throughput": self.per_second(self.output_tokens),
            "total_token_throughput": self.per_second(self.input_tokens + self.output_tokens),
            "request_goodput": None if self.good is None else self.per_second(self.good),
            "good_requests": self.good,
            "peak_concurrency": self.peak_concurrency,
            "max_delay_ms": self.max_delay * 1000,
        }
        for name in METRICS:
            values = self.latencies[name]
            row[f"mean_{name}_ms"] = values.mean if values else None
            for percent in PERCENTILES:
                row[f"p{percent}_{name}_ms"] = dict(values.percentiles)[percent] if values else None
        return row


def evaluate(load: Load, records: Sequence[Record], slo: Slo | None = None) -> Point:
    """Summarise the records of one point; at least one."""
    ok = [record for record in records if record.error is None]
    samples = {
        "ttft": [record.ttft for record in ok],
        "tpot": [record.tpot for record in ok if record.tpot is not None],
        "itl": [gap for record in ok for gap in record.itl],
        "e2el": [record.e2el for record in ok],
    }
    errors = Counter(record.error for record in records if record.error is not None)
    return Point(
        load,
        tuple(records),
        max(record.finished for record in records),
        {name: Distribution.of(values) for name, values in samples.items()},
        dict(sorted(errors.items())),
        None if slo is None else sum(slo.met(record) for record in ok),
    )
