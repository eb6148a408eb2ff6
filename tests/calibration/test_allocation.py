"""Distortions against samples, water-filling against all allocations."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch

from minicache_trt.calibration.allocation import (
    DISTORTION,
    MOST_BITS,
    RUN,
    gaussian_allocations,
    minmax_allocations,
)
from minicache_trt.compression.constants import gaussian_levels
from minicache_trt.compression.quantize import load, store
from minicache_trt.compression.segment import Segment


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_distortion_of_normal_numbers(bits: int) -> None:
    x = np.random.default_rng(0).standard_normal(400_000)
    levels = np.array(gaussian_levels(bits))
    nearest = levels[np.abs(x[:, None] - levels).argmin(1)]
    assert DISTORTION[bits] == pytest.approx(((x - nearest) ** 2).mean(), rel=0.01)


def test_every_step_is_the_best_of_its_size() -> None:
    runs = np.array([9.0, 2.0, 0.7, 0.05])
    found = {
        sum(s.length * s.bits for s in each.segments) // RUN: each
        for each in gaussian_allocations(runs.repeat(RUN) / RUN)
    }
    assert sorted(found) == list(range(1, 17))
    for total, each in found.items():
        least = min(
            sum(run * DISTORTION[b] for run, b in zip(runs, bits, strict=True))
            for bits in product(range(MOST_BITS + 1), repeat=4)
            if sum(bits) == total
        )
        assert each.expected == pytest.approx(least)
        assert (
            len(each.segments) <= 4 and [s.bits for s in each.segments] == sorted({s.bits for s in each.segments})[::-1]
        )


def test_what_is_beyond_the_largest_rank_is_lost() -> None:
    each = gaussian_allocations(np.ones(512))[-1]
    assert sum(segment.length for segment in each.segments) == 256
    assert each.expected == pytest.approx(256 * DISTORTION[4] + 256)
    assert all(sum(s.length for s in a.segments) <= 256 for a in minmax_allocations(np.ones(512)))


def test_minmax_losses_are_those_of_the_quantizer() -> None:
    torch.manual_seed(0)
    cost = np.repeat([4.0, 1.0, 0.5, 0.2], RUN)
    y = torch.randn(1, 1, 20_000, 64) * torch.from_numpy(cost).sqrt().float()
    seen = set()
    for each in minmax_allocations(cost):
        lost, place = 0.0, 0
        for segment in each.segments:
            part = y[..., place : place + segment.length]
            # The transform makes every component a mixture of all: here a random rotation of the same variance.
            mixed = torch.randn_like(part) * part.square().mean().sqrt()
            plain = Segment(segment.length, segment.format)
            lost += float((load(plain, *store(plain, mixed)) - mixed).square().mean((0, 1, 2)).sum())
            place += segment.length
        lost += float(cost[place:].sum())
        assert each.expected == pytest.approx(lost, rel=0.12), each
        seen.add(tuple(segment.format for segment in each.segments))
    assert ("int8", "int4", "int2") in seen and ("int8",) in seen
