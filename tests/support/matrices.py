"""Random constants that a plan accepts."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from minicache_trt.compression.matrices import required
from minicache_trt.compression.plan import CompressionPlan
from minicache_trt.config import ModelConfig


def random_matrices(plan: CompressionPlan, config: ModelConfig, seed: int = 0) -> dict[str, NDArray[np.generic]]:
    """Orthogonal ``align``, permutations, ``encode`` of orthonormal columns times scales with its pseudo-inverse as
    ``decode``, small means and positive deviations, for every stream that needs them."""
    rng = np.random.default_rng(seed)
    result: dict[str, NDArray[np.generic]] = {}
    for index, stream in enumerate(plan.streams):
        own: dict[str, NDArray[np.generic]] = {}
        for name, (dtype, shape) in required(stream, config).items():
            if name == "head_map":
                own[name] = np.stack([rng.permutation(shape[1]) for _ in range(shape[0])]).astype(dtype)
            elif name == "align":
                own[name] = orthonormal(rng, shape).astype(dtype)
            elif name == "encode":
                basis, scales = orthonormal(rng, shape), rng.uniform(0.5, 2.0, (shape[0], 1, shape[2]))
                own[name] = (basis * scales).astype(dtype)
                own["decode"] = (basis / scales).swapaxes(1, 2).astype(dtype)
            elif name == "mean":
                own[name] = (0.3 * rng.standard_normal(shape)).astype(dtype)
            elif name == "sigma":
                own[name] = rng.uniform(0.5, 2.0, shape).astype(dtype)
        result |= {f"streams.{index}.{name}": np.ascontiguousarray(value) for name, value in own.items()}
    return result


def orthonormal(rng: np.random.Generator, shape: tuple[int, ...]) -> NDArray[np.float64]:
    """Random matrices ``[..., rows, columns]`` with orthonormal columns, at most as many as rows."""
    q, r = np.linalg.qr(rng.standard_normal(shape))
    return q * np.sign(np.diagonal(r, axis1=-2, axis2=-1))[..., None, :]
