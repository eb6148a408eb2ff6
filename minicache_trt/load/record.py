"""What became of one request."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True)
class Record:
    """Times of one request, in seconds since its point began.

    Parameters
    ----------
    due : float
        When its turn to be sent came.
    sent : float
        When it was sent; later than ``due`` when the generator held it back.
    chunks : tuple of float
        When each piece of text arrived.
    finished : float
        When the answer had ended, or failed.
    input_tokens, output_tokens : int, optional
        As the endpoint counted them; without that the output tokens are the pieces of text.
    error : str, optional
        Kind of failure: ``http_429``, ``http_503``, ``connect``, ``disconnect``, ``timeout``, ``stream_error`` (the
        endpoint reported one in the middle), ``malformed``.
    message : str
        What the endpoint or the library said about it.
    text : str
        What was generated.
    """

    due: float
    sent: float
    chunks: tuple[float, ...]
    finished: float
    input_tokens: int | None = None
    output_tokens: int = 0
    error: str | None = None
    message: str = ""
    text: str = ""

    @property
    def ttft(self) -> float:
        """Time to first token: from sending to the first piece of text, or to the end when there was none."""
        return (self.chunks[0] if self.chunks else self.finished) - self.sent

    @property
    def e2el(self) -> float:
        """End-to-end latency: from sending to the end."""
        return self.finished - self.sent

    @property
    def itl(self) -> list[float]:
        """Inter-token latencies: times between pieces of text."""
        return [after - before for before, after in pairwise(self.chunks)]

    @property
    def tpot(self) -> float | None:
        """Time per output token after the first; None with fewer than two tokens or pieces."""
        if self.output_tokens < 2 or len(self.chunks) < 2:
            return None
        return (self.chunks[-1] - self.chunks[0]) / (self.output_tokens - 1)
