"""Frequencies of rotary position embeddings."""

from __future__ import annotations

import math

import torch

from minicache_trt.config import RopeConfig


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> torch.Tensor:
    """Angles per position, float32, computed as Hugging Face computes them (float32 throughout).

    One for each pair of rotated components, ``[head_dim / 2]`` where whole heads are rotated. ``llama3`` interpolates
    between scaled and unscaled frequencies by wavelength (Llama 3.1 model card).
    """
    dim = int(head_dim * rope.rotary_fraction)
    exponent = torch.arange(0, dim, 2, dtype=torch.int64).float() / dim
    if rope.divisors:
        return 1.0 / (torch.tensor(rope.divisors, dtype=torch.float32) * rope.theta**exponent)
    frequency = 1.0 / (rope.theta**exponent)
    if rope.scaling == "linear":
        return frequency / rope.factor
    if rope.scaling == "llama3":
        wavelength = 2 * math.pi / frequency
        low = rope.original_max_position / rope.low_freq_factor
        high = rope.original_max_position / rope.high_freq_factor
        smooth = (rope.original_max_position / wavelength - rope.low_freq_factor) / (
            rope.high_freq_factor - rope.low_freq_factor
        )
        between = (1 - smooth) * frequency / rope.factor + smooth * frequency
        scaled = torch.where(wavelength > low, frequency / rope.factor, frequency)
        return torch.where((wavelength >= high) & (wavelength <= low), between, scaled)
    return frequency
