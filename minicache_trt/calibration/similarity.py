"""How alike neighbouring layers are, before and after their heads are matched and aligned."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from minicache_trt.calibration.collect import run_layers
from minicache_trt.calibration.matching import procrustes
from minicache_trt.calibration.model import CalibrationModel
from minicache_trt.calibration.moments import Moments
from minicache_trt.calibration.samples import Samples
from minicache_trt.compression.stream import PARTS
from minicache_trt.tracing.similarity import PairSimilarity, compare_vectors

SEQUENCES = 2
"""Sequences compared; thousands of vectors of each head are enough for percentiles."""


@dataclass(frozen=True)
class Similarities:
    """Adjacent layers as they are, and after matching of heads and Procrustes alignment; keys and values."""

    before: tuple[PairSimilarity, ...]
    after: tuple[PairSimilarity, ...]


def alignments(moments: Moments) -> NDArray[np.float64]:
    """``[2, L - 1, H, D, D]``: rotations that bring layer l + 1 to layer l, by slot, keys before RoPE."""
    return procrustes(moments.second[:, 1, :-1].swapaxes(-1, -2))


def similarities(model: CalibrationModel, samples: Samples, moments: Moments) -> Similarities:
    """Measure on the first sequences of a set that the alignments were not computed from."""
    rotations = alignments(moments)
    before: list[PairSimilarity] = []
    after: list[PairSimilarity] = []
    previous: dict[int, Tensor] = {}

    def observe(layer: int, states: tuple[Tensor, Tensor]) -> None:
        for part, x in enumerate(states):
            if layer:
                pair = (layer - 1, layer)
                before.append(compare_vectors(PARTS[part], pair, False, _rows(previous[part]), _rows(x)))
                slots = [
                    y[:, torch.from_numpy(moments.head_map[part, at])]
                    for y, at in ((previous[part], layer - 1), (x, layer))
                ]
                turned = slots[1] @ torch.from_numpy(rotations[part, layer - 1]).float()
                after.append(compare_vectors(PARTS[part], pair, False, _rows(slots[0]), _rows(turned)))
            previous[part] = x

    with torch.inference_mode():
        run_layers(model, samples.rows(slice(0, SEQUENCES)), observe)
    return Similarities(tuple(before), tuple(after))


def _rows(x: Tensor) -> NDArray[np.float64]:
    rows: NDArray[np.float64] = x.flatten(0, 2).double().numpy()
    return rows
