"""Which tokens of a block are stored exactly.

Every rule is a matter of *strength* and *threshold*: tokens stronger than the threshold qualify, and if there are more
than fit, the strongest stay. Sinks are infinitely strong.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from minicache_trt.compression.stream import Stream


@dataclass(frozen=True)
class Ranking:
    """One head's tokens of one block.

    Parameters
    ----------
    strengths : list of float
        By position. The score (pi where it has no meaning), for ``paper_literal`` its negative (minus infinity where
        it has no meaning); infinity for sinks.
    threshold : float
        Minus infinity if every token qualifies.
    capacity : int
        Tokens that fit.
    """

    strengths: list[float]
    threshold: float
    capacity: int

    @property
    def qualified(self) -> list[int]:
        """Positions stronger than the threshold, strongest first; ties go to the lower position."""
        positions = [i for i, strength in enumerate(self.strengths) if strength > self.threshold]
        return sorted(positions, key=lambda i: (-self.strengths[i], i))

    @property
    def kept(self) -> list[int]:
        """Positions that are retained, ascending."""
        return sorted(self.qualified[: self.capacity])

    def distances(self, chosen: list[int]) -> list[float]:
        """How far from its boundary each position is that another implementation decided differently about.

        A token it kept in addition may be too weak for the capacity or for the threshold; one it dropped may have lost
        its place to a stronger one or to the threshold.
        """
        qualified, kept = self.qualified, self.kept
        entry = min((self.strengths[i] for i in kept), default=math.inf)
        if len(kept) < self.capacity:
            entry = self.threshold
        exit_ = self.threshold
        if len(qualified) > self.capacity and len(chosen) == self.capacity:
            exit_ = max(self.threshold, self.strengths[qualified[self.capacity]])
        added = [entry - self.strengths[i] for i in chosen if i not in kept]
        dropped = [self.strengths[i] - exit_ for i in kept if i not in chosen]
        return [max(0.0, distance) for distance in (*added, *dropped)]


def rank(score: Tensor, meaningful: Tensor, block_index: int, stream: Stream) -> Ranking:
    """Of one head's tokens; ``score [B]``, ``meaningful [B]``."""
    scores: list[float] = score.tolist()
    usable: list[bool] = meaningful.tolist()
    judged = [s for s, useful in zip(scores, usable, strict=True) if useful]
    literal = stream.retention == "paper_literal"
    threshold = -math.inf
    if judged and stream.retention != "topk":
        margin = (max(judged) - min(judged)) * stream.gamma
        threshold = -(min(judged) + margin) if literal else max(judged) - margin
    strengths = list(scores)
    if literal:
        strengths = [-s if useful else -math.inf for s, useful in zip(scores, usable, strict=True)]
    if block_index == 0:
        strengths[: stream.sink_tokens] = [math.inf] * stream.sink_tokens
    return Ranking(strengths, threshold, stream.retained)


def rankings(score: Tensor, meaningful: Tensor, block_index: Tensor, stream: Stream) -> list[list[Ranking]]:
    """Per block and head; ``score`` and ``meaningful [N, Hn, B]``, ``block_index [N]``."""
    return [
        [rank(score[n, h], meaningful[n, h], int(number), stream) for h in range(score.shape[1])]
        for n, number in enumerate(block_index)
    ]


def choose(score: Tensor, meaningful: Tensor, block_index: Tensor, stream: Stream) -> Tensor:
    """Retained positions, int64 ``[N, Hn, R]``: ascending, unused slots (-1) last."""
    rows = [
        [[*ranking.kept, *[-1] * (stream.retained - len(ranking.kept))] for ranking in block]
        for block in rankings(score, meaningful, block_index, stream)
    ]
    return torch.tensor(rows, dtype=torch.int64).reshape(*score.shape[:2], stream.retained)


def retained_mask(index: Tensor, tokens: int) -> Tensor:
    """bool ``[N, Hn, tokens]`` of ``index [N, Hn, R]``."""
    return (index[..., None] == torch.arange(tokens)).any(dim=2)


def gather_retained(x: Tensor, index: Tensor) -> Tensor:
    """Tokens ``index [N, H, R]`` of ``x [N, m, H, B, D]``: ``[N, m, H, R, D]``, zeros in unused slots."""
    blocks, heads, capacity = index.shape
    result = x.new_zeros(blocks, x.shape[1], heads, capacity, x.shape[-1])
    for n, h, slot in (index >= 0).nonzero().tolist():
        result[n, :, h, slot] = x[n, :, h, index[n, h, slot]]
    return result


def override_retained(x: Tensor, index: Tensor, exact: Tensor) -> Tensor:
    """``x [N, m, H, B, D]`` with the retained tokens replaced by ``exact [N, m, H, R, D]``."""
    result = x.clone()
    for n, h, slot in (index >= 0).nonzero().tolist():
        result[n, :, h, index[n, h, slot]] = exact[n, :, h, slot].to(x.dtype)
    return result
