"""The pass over the calibration sequences: second moments of keys and values, and how much the loss depends on each.

Sensitivity is the Fisher information: with labels drawn from the model's own distribution, the second moment of the
log-likelihood's derivative is the Hessian of the divergence, so that errors of covariance C in a stream's restored
vectors cost about ``tr(F C) / 2``. The derivative is taken with respect to what later tokens read as compressed
history, not to the exact vectors within their window.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from minicache_trt.calibration.matching import match_heads
from minicache_trt.calibration.model import CalibrationModel
from minicache_trt.calibration.moments import Moments
from minicache_trt.calibration.rotary import unrotate
from minicache_trt.calibration.samples import Samples
from minicache_trt.compression.calibration_text import Progress
from minicache_trt.compression.stream import PARTS
from minicache_trt.config import BLOCK_SIZE
from minicache_trt.errors import UserError
from minicache_trt.model.masked_attention import masked_attention, visible_keys

BATCH_TOKENS = 4096
"""Tokens run together without derivatives; with them it is one sequence."""
MATCHED_TOKENS = 2048
"""Tokens that heads are matched on."""

Checkpoint = Callable[[Moments, int], None]
"""Takes the sums after so many sequences."""


def first_moments(model: CalibrationModel, samples: Samples, reach: int) -> Moments:
    """Empty sums whose slots are matched on the first sequences."""
    config = model.config
    count = max(1, min(len(samples), MATCHED_TOKENS // samples.tokens.shape[1]))
    head_map = np.tile(np.arange(config.num_kv_heads), (len(PARTS), config.num_layers, 1))
    if config.num_kv_heads > 1:
        before: dict[int, NDArray[np.float64]] = {}
        matched = {part: np.arange(config.num_kv_heads) for part in range(len(PARTS))}

        def match(layer: int, states: tuple[Tensor, Tensor]) -> None:
            for part, x in enumerate(states):
                flat = x.transpose(1, 2).flatten(0, 1).double().numpy()
                if layer:
                    matched[part] = match_heads(before[part], flat)[matched[part]]
                    head_map[part, layer] = matched[part]
                before[part] = flat

        with torch.inference_mode():
            run_layers(model, samples.rows(slice(0, count)), match)
    return Moments.zeros(config, head_map, reach)


def collect(
    model: CalibrationModel, samples: Samples, gradients: int, weights: NDArray[np.float64], window: int,
    moments: Moments, done: int, checkpoint: Checkpoint, progress: Progress,
) -> Moments:  # fmt: skip
    """Add all sequences from number ``done`` on; derivatives of the first ``gradients``.

    Parameters
    ----------
    weights : ndarray
        ``[S]``, of a token of each sequence.
    """
    size = max(1, BATCH_TOKENS // samples.tokens.shape[1])
    while done < len(samples):
        progress(done, len(samples))
        count = 1 if done < gradients else size
        own = slice(done, done + count)
        each = torch.from_numpy(weights[own]).float()
        if done < gradients:
            _add_gradients(model, samples.rows(own), each, window, moments, seed=done)
        _add_moments(model, samples.rows(own), each, moments)
        done = min(done + count, len(samples))
        checkpoint(moments, done)
    progress(done, len(samples))
    return moments


def run_layers(
    model: CalibrationModel, samples: Samples, observe: Callable[[int, tuple[Tensor, Tensor]], None]
) -> None:
    """Run the uncompressed model; ``observe`` takes each layer's keys before RoPE and values ``[S, H, T, D]``."""
    config = model.config
    visible = visible_keys(0, samples.tokens.shape[1], config)

    def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        _check_finite(layer, key, value)
        observe(layer, (unrotate(config.at_layer(layer), key), value))
        return masked_attention(query, key, value, visible[layer], config.attention_softcap)

    hidden = model.embed(torch.from_numpy(samples.tokens))
    for layer in range(config.num_layers):
        hidden = model.layer(layer, hidden, 0, attend)


def _check_finite(layer: int, key: Tensor, value: Tensor) -> None:
    if not (torch.isfinite(key).all() and torch.isfinite(value).all()):
        raise UserError(
            f"layer {layer} computes keys or values that are not finite on the calibration text",
            "check the checkpoint: its weights may be damaged",
        )


def _add_moments(model: CalibrationModel, samples: Samples, weights: Tensor, moments: Moments) -> None:
    config = model.config
    visible = visible_keys(0, samples.tokens.shape[1], config)
    recent: tuple[list[Tensor], list[Tensor]] = ([], [])

    def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        _check_finite(layer, key, value)
        for part, x in enumerate((key, value)):
            moments.add_range(part, layer, x)
            moments.add(part, layer, x if part else unrotate(config.at_layer(layer), x), weights, recent[part])
        return masked_attention(query, key, value, visible[layer], config.attention_softcap)

    with torch.inference_mode():
        hidden = model.embed(torch.from_numpy(samples.tokens))
        for layer in range(config.num_layers):
            hidden = model.layer(layer, hidden, 0, attend)
        moments.weight += float(weights.sum()) * samples.tokens.shape[1]


def _add_gradients(
    model: CalibrationModel, samples: Samples, weights: Tensor, window: int, moments: Moments, seed: int
) -> None:
    """Derivatives of the log-likelihood of labels sampled at the scored positions."""
    config, length = model.config, samples.tokens.shape[1]
    visible = visible_keys(0, length, config)
    compressed = (torch.arange(length)[:, None] - window).clamp(min=0) // BLOCK_SIZE * BLOCK_SIZE
    restored = torch.arange(length) < compressed
    both = {id(mask): torch.cat([mask & restored, mask & ~restored], 1) for mask in visible}
    shape = (len(samples), config.num_kv_heads, length, config.head_dim)
    errors = [[torch.zeros(shape, requires_grad=True) for _ in range(config.num_layers)] for _ in PARTS]

    def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        _check_finite(layer, key, value)
        keys, values = (torch.cat([x + errors[i][layer], x], 2) for i, x in enumerate((key, value)))
        return masked_attention(query, keys, values, both[id(visible[layer])], config.attention_softcap)

    hidden = model.embed(torch.from_numpy(samples.tokens))
    for layer in range(config.num_layers):
        hidden = model.layer(layer, hidden, 0, attend)
    log_p = model.logits(model.final(hidden)[torch.from_numpy(samples.scored)]).log_softmax(-1)
    labels = torch.multinomial(log_p.detach().exp(), 1, generator=torch.Generator().manual_seed(seed))
    derivatives = torch.autograd.grad(log_p.gather(1, labels).sum(), [e for part in errors for e in part])
    if not all(each.isfinite().all() for each in derivatives):
        raise UserError(
            "derivatives of the model are not finite on the calibration text",
            "check the checkpoint: its weights may be damaged, or hidden states vanish (an embedding of zeros)",
        )
    with torch.inference_mode():
        for part in range(len(PARTS)):
            recent: list[Tensor] = []
            for layer in range(config.num_layers):
                g = derivatives[part * config.num_layers + layer]
                g = g if part else unrotate(config.at_layer(layer), g)
                moments.add_gradient(part, layer, g, weights, recent)
    moments.gradient_weight += float((weights * torch.from_numpy(samples.scored).sum(1)).sum())
