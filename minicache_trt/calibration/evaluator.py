"""What a plan costs a model on sample sequences, each token reading its history as an engine would have it.

For a query at position p, with c its compressed length::

    positions   [0, c)                        [c, p]
    attends to  blocks that were compressed   exact keys and values
                from what the layer computed
                (already under compression),
                then restored

c is the same for a block of queries, so sequences advance block by block, all of them together; layers below the first
compressed one are computed once. The loss is the divergence of the next token's distribution from the uncompressed
model's, in nats: it has far less noise than a difference of log-likelihoods, cannot be negative, and nearly adds up
over streams.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from minicache_trt.calibration.coded import CodedStream, History
from minicache_trt.calibration.model import CalibrationModel
from minicache_trt.calibration.samples import Samples
from minicache_trt.config import BLOCK_SIZE
from minicache_trt.errors import UserError
from minicache_trt.model.masked_attention import masked_attention, visible_keys

BATCH_TOKENS = 8192
"""Tokens whose states are computed together."""
CACHE_BYTES = 1 << 29
"""Hidden states of the uncompressed model kept for all layers, at most; beyond it only those before the first."""
LOGIT_ROWS = 2048
"""Rows of logits held at a time."""


@dataclass(frozen=True)
class Losses:
    """Means over scored tokens of text and of recall sequences (0 where there are none), in nats and as a share.

    ``divergence``: Kullback-Leibler, from the uncompressed model's distribution of the next token. ``nll``: of the next
    token. ``right``: share of tokens that are the most likely one.
    """

    divergence: tuple[float, float]
    nll: tuple[float, float]
    right: tuple[float, float]

    def loss(self, recall_share: float) -> float:
        """Divergence of the mixture."""
        return (1 - recall_share) * self.divergence[0] + recall_share * self.divergence[1]


@dataclass(frozen=True)
class _Batch:
    """Sequences run together, with what the uncompressed model makes of them.

    ``inputs``: hidden states before each layer, or before the first alone. ``expected [n, hidden]``: of each scored
    token, the mean of the output weights under the uncompressed distribution; of models with capped logits, for which
    the mean logit is not a product with it, the hidden state itself. ``information [n]``: the negative entropy of that
    distribution.
    """

    samples: Samples
    inputs: tuple[Tensor, ...]
    expected: Tensor
    information: Tensor


class Evaluator:
    """Measures plans, or single streams, on one set of samples."""

    def __init__(self, model: CalibrationModel, samples: Samples, window: int) -> None:
        self.model, self.window = model, window
        self.length = samples.tokens.shape[1]
        size = max(1, BATCH_TOKENS // self.length)
        per_layer = samples.tokens.size * model.config.hidden_size * 4
        self._keep = per_layer * model.config.num_layers <= CACHE_BYTES
        parts = [samples.rows(slice(start, start + size)) for start in range(0, len(samples), size)]
        rows = []
        self._batches = []
        with torch.inference_mode():
            for part in parts:
                batch, hidden = self._reference(part)
                self._batches.append(batch)
                rows.append(self._score(batch, hidden))
        self.uncompressed = _losses(samples, rows)
        self._samples = samples

    def measure(self, streams: Sequence[CodedStream]) -> Losses:
        """Losses when these streams are compressed and everything else is exact."""
        layers = [layer for coded in streams for layer in coded.layout.stream.layers]
        first = min(layers, default=0) if self._keep else 0
        with torch.inference_mode():
            rows = [self._score(batch, self._run(batch, streams, first)) for batch in self._batches]
        return _losses(self._samples, rows)

    def _reference(self, samples: Samples) -> tuple[_Batch, Tensor]:
        model = self.model
        hidden = model.embed(torch.from_numpy(samples.tokens))
        visible, cap = visible_keys(0, self.length, model.config), model.config.attention_softcap

        def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return masked_attention(query, key, value, visible[layer], cap)

        inputs = []
        for layer in range(model.config.num_layers):
            if self._keep or not layer:
                inputs.append(hidden)
            hidden = model.layer(layer, hidden, 0, attend)
        hidden = model.final(hidden)
        expected, information = [], []
        for rows in torch.split(hidden[torch.from_numpy(samples.scored)], LOGIT_ROWS):
            log_p = model.logits(rows).log_softmax(-1)
            if not torch.isfinite(log_p).all():
                raise UserError(
                    "the model computes numbers that are not finite on the calibration text",
                    "check the checkpoint: its weights may be damaged",
                )
            p = log_p.exp()
            expected.append(p @ model.output_weight if model.config.logit_softcap is None else rows)
            information.append((p * log_p).sum(-1))
        return _Batch(samples, tuple(inputs), torch.cat(expected), torch.cat(information)), hidden

    def _run(self, batch: _Batch, streams: Sequence[CodedStream], first: int) -> Tensor:
        """Final hidden states ``[S, length, hidden]`` with the streams compressed."""
        model = self.model
        history = History(model.config, streams, first, (len(batch.samples), self.length))
        parts = []
        for begin, end, compressed in self._ranges():
            history.compress(compressed)
            hidden = batch.inputs[first][:, begin:end]
            for layer in range(first, model.config.num_layers):
                hidden = model.layer(layer, hidden, begin, history.attend)
            history.advance(end)
            parts.append(model.final(hidden))
        return torch.cat(parts, 1)

    def _ranges(self) -> list[tuple[int, int, int]]:
        """Ranges ``(begin, end, c)`` of positions with the same compressed length c."""

        def compressed(position: int) -> int:
            return max(0, position - self.window) // BLOCK_SIZE * BLOCK_SIZE

        groups = [(key, list(members)) for key, members in groupby(range(self.length), compressed)]
        return [(members[0], members[-1] + 1, key) for key, members in groups]

    def _score(self, batch: _Batch, hidden: Tensor) -> Tensor:
        """Divergence, nll and whether the next token is the most likely one: ``[3, n]`` of the scored tokens."""
        samples = batch.samples
        scored = torch.from_numpy(samples.scored)
        following = torch.from_numpy(samples.tokens).roll(-1, 1)[scored]
        result = []
        parts = (hidden[scored], following, batch.expected, batch.information)
        for rows, target, expected, information in zip(*(torch.split(part, LOGIT_ROWS) for part in parts), strict=True):
            logits = self.model.logits(rows)
            total = logits.logsumexp(-1)
            divergence = information - self._mean_logit(expected, rows, logits) + total
            nll = total - logits.gather(1, target[:, None])[:, 0]
            result.append(torch.stack([divergence, nll, (logits.argmax(-1) == target).float()]))
        return torch.cat(result, 1)

    def _mean_logit(self, expected: Tensor, rows: Tensor, logits: Tensor) -> Tensor:
        """Mean of ``logits [n, vocab]``, which are those of ``rows``, under the uncompressed distributions."""
        if self.model.config.logit_softcap is None:
            return (expected * rows).sum(-1)
        return (self.model.logits(expected).softmax(-1) * logits).sum(-1)


def _losses(samples: Samples, rows: list[Tensor]) -> Losses:
    values = torch.cat(rows, 1).double()
    recall = torch.from_numpy(samples.recall.repeat(samples.scored.sum(1)))
    means = [values[:, mask].mean(1).tolist() if mask.any() else [0.0] * 3 for mask in (~recall, recall)]
    divergence, nll, right = zip(*means, strict=True)
    return Losses(divergence, nll, right)
