"""Walsh-Hadamard transforms and rotations against their definitions."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from minicache_trt.compression.rotation import rotate, unrotate
from minicache_trt.compression.segment import Segment
from minicache_trt.compression.transforms import hadamard_runs, transform
from minicache_trt.config import ModelConfig, RopeConfig

RUNS = {16: [16], 48: [32, 16], 64: [64], 80: [64, 16], 112: [64, 32, 16], 256: [256]}


def sylvester(size: int) -> np.ndarray:
    matrix = np.ones((1, 1))
    while len(matrix) < size:
        matrix = np.kron([[1, 1], [1, -1]], matrix)
    return matrix / np.sqrt(size)


@pytest.mark.parametrize("length", RUNS)
def test_hadamard_is_sylvesters_matrix_run_by_run(length: int) -> None:
    assert hadamard_runs(length) == RUNS[length]
    expected = np.zeros((length, length))
    start = 0
    for run in RUNS[length]:
        expected[start : start + run, start : start + run] = sylvester(run)
        start += run
    segment = Segment(length, "int4", transform="hadamard")
    torch.testing.assert_close(transform(segment, torch.eye(length)), torch.from_numpy(expected).float())
    x = torch.randn(2, 3, 5, length)
    torch.testing.assert_close(transform(segment, transform(segment, x)), x)
    torch.testing.assert_close(transform(segment, x).norm(dim=-1), x.norm(dim=-1))


def test_no_transform_is_no_change() -> None:
    x = torch.randn(3, 16)
    assert transform(Segment(16), x) is x


ROPES = [RopeConfig(), RopeConfig(500000.0, "llama3", 8.0, 1.0, 4.0, 256), RopeConfig(10000.0, "linear", 4.0)]


@pytest.mark.parametrize("rope", ROPES, ids=lambda rope: rope.scaling)
def test_rotation_is_the_decoders(rope: RopeConfig) -> None:
    from minicache_trt.model.torch_ops import TorchOps

    config = ModelConfig("llama", 1, 64, 64, 4, 2, 80, 100, 4096, rope=rope)
    torch.manual_seed(0)
    keys, block_index = torch.randn(3, 2, 64, 80), torch.tensor([0, 7, 2])
    ops = TorchOps(config, {}, lambda q, k, v, layer: q)
    for block, index in zip(keys, block_index, strict=True):
        positions = int(index) * 64 + torch.arange(64)
        rotated = ops.rotary(block.transpose(0, 1).flatten(1), ops.rotation(positions, rope), 2)
        expected = rotated.view(64, 2, 80).transpose(0, 1)
        torch.testing.assert_close(rotate(config, block[None], index[None])[0], expected)
    torch.testing.assert_close(unrotate(config, rotate(config, keys, block_index), block_index), keys)
