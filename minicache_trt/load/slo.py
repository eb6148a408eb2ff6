"""Service level objectives."""

from __future__ import annotations

import re
from dataclasses import dataclass

from minicache_trt.errors import UserError
from minicache_trt.load.record import Record

NAMES = {"ttft": "ttft", "tpot": "tpot", "itl": "itl", "e2el": "e2el", "e2e": "e2el"}


@dataclass(frozen=True)
class Slo:
    """Upper limits a request has to keep, in seconds, by metric.

    ``itl`` limits the mean of the request's inter-token latencies; what a request does not have (one token has no
    inter-token latency) cannot break a limit.
    """

    limits: tuple[tuple[str, float], ...]

    def met(self, record: Record) -> bool:
        """Whether a request ended well and within all limits."""
        if record.error is not None:
            return False
        gaps = record.itl
        values = {
            "ttft": record.ttft,
            "tpot": record.tpot or 0.0,
            "itl": sum(gaps) / len(gaps) if gaps else 0.0,
            "e2el": record.e2el,
        }
        return all(values[name] <= limit for name, limit in self.limits)


def parse_slo(texts: list[str]) -> Slo | None:
    """``["ttft=500ms,itl=50ms"]`` or, as for vLLM, ``["ttft:500", "tpot:50"]``; milliseconds without a unit.

    Raises
    ------
    UserError
        Naming the part that says nothing.
    """
    limits: dict[str, float] = {}
    for part in (part.strip() for text in texts for part in text.split(",")):
        match = re.fullmatch(r"(\w+)\s*[=:]\s*(\d+(?:\.\d*)?)\s*(ms|s|)", part)
        if not match or match[1] not in NAMES or float(match[2]) <= 0:
            raise UserError(
                f"--slo: expected limits such as ttft=500ms,itl=50ms, got {part!r}", f"metrics: {', '.join(NAMES)}"
            )
        limits[NAMES[match[1]]] = float(match[2]) / (1 if match[3] == "s" else 1000)
    return Slo(tuple(limits.items())) if limits else None
