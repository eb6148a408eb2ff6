"""Scales and clips of the output layer, whose weights are read a few rows at a time: it is the largest of all."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from minicache_trt.checkpoint.weights import WeightView
from minicache_trt.config import ModelConfig
from minicache_trt.model.torch_ops import TorchOps
from minicache_trt.quantization.folding import divided_norm
from minicache_trt.quantization.groups import refuse_damaged
from minicache_trt.quantization.layer import InputStatistics
from minicache_trt.quantization.reading import read_rows, read_weight
from minicache_trt.quantization.rounding import quantize_rows
from minicache_trt.quantization.search import (
    COARSE,
    AwqSettings,
    channel_scales,
    clip_factors,
    scaled_rounding,
)


def search_head(
    config: ModelConfig, norm_view: WeightView, view: WeightView, hidden: list[Tensor], settings: AwqSettings
) -> Iterator[tuple[str, NDArray[Any]]]:
    """Pieces of ``lm_head.codes``, ``lm_head.scales`` and ``norm.weight``.

    Parameters
    ----------
    config : ModelConfig
    norm_view : WeightView
        Of the last norm, ``[hidden]``.
    view : WeightView
        ``[vocab, hidden]``.
    hidden : list of Tensor
        States after the last layer, ``[T, hidden]`` each.
    settings : AwqSettings
    """
    norm = read_weight(norm_view)
    ops = TorchOps(config, {"norm.weight": norm}, _no_attention)
    inputs = [ops.rms_norm(x, "norm") for x in hidden]
    statistics = InputStatistics.empty(config.hidden_size, settings.block)
    for x in inputs:
        statistics.add(x)
    candidates = {alpha: channel_scales(statistics.magnitude, alpha) for alpha in COARSE}
    errors = dict.fromkeys(candidates, 0.0)
    tokens = torch.cat(inputs[: settings.search_sequences])
    for _, rows in read_rows(view):
        weight = rows.float()
        if not weight.isfinite().all():
            refuse_damaged([view])
        for alpha, scales in candidates.items():
            difference = scaled_rounding(weight, scales, settings.bits, settings.block) - weight
            errors[alpha] += float((tokens @ difference.T).square().sum())
    scales = candidates[min(errors, key=lambda alpha: errors[alpha])]
    statistics.divide(scales)
    yield "norm.weight", divided_norm(norm, scales, config).numpy()
    for _, rows in read_rows(view):
        weight = rows.float() * scales
        clip = clip_factors(weight, statistics.moments, settings.bits, settings.block)
        codes, block_scales = quantize_rows(weight, settings.bits, settings.block, clip)
        yield "lm_head.codes", codes.numpy()
        yield "lm_head.scales", block_scales.numpy()


def _no_attention(q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
    raise NotImplementedError
