"""What the last requests looked like, for the status page."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence

KEPT = 200


class Recent:
    """Times to first token of the latest requests and divergences of the latest audits; any thread may use it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._first_tokens: deque[float] = deque(maxlen=KEPT)
        self._audits: deque[tuple[float, int, int]] = deque(maxlen=KEPT)

    def first_token(self, seconds: float) -> None:
        """A request had its first token after so long."""
        with self._lock:
            self._first_tokens.append(seconds)

    def audited(self, divergences: Sequence[float], agreements: int) -> None:
        """A request was replayed: KL of its tokens, and how many had the same most likely token."""
        with self._lock:
            self._audits.append((sum(divergences), agreements, len(divergences)))

    def percentile(self, share: float) -> float | None:
        """Seconds within which this share of the latest requests had their first token; None before the first."""
        with self._lock:
            ordered = sorted(self._first_tokens)
        return ordered[min(int(share * len(ordered)), len(ordered) - 1)] if ordered else None

    def audit(self) -> tuple[float, float] | None:
        """Mean KL and top-1 agreement of the tokens audited lately; None before the first."""
        with self._lock:
            audits = list(self._audits)
        count = sum(tokens for _, _, tokens in audits)
        if not count:
            return None
        return sum(kl for kl, _, _ in audits) / count, sum(agreements for _, agreements, _ in audits) / count
