"""Optimization profiles: what each symbol of the contract may be in a step of decodes, and in one with prefill."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from minicache_trt.compression.plan import CompressionPlan
from minicache_trt.config import BLOCK_SIZE, BuildConfig, KvCacheConfig, ModelConfig
from minicache_trt.contract import (
    COMPRESSOR_INPUTS,
    PoolSpec,
    compressed_block_bytes,
    compressed_pools,
    decoder_inputs,
    full_block_bytes,
    full_pools,
)
from minicache_trt.runtime.cache_sizes import CacheSizes

LARGEST_VOLUME = 2**31 - 1
"""Elements of the largest tensor TensorRT takes."""
COMPRESSED_AT_ONCE = 16
"""Blocks a compressor takes at most: it holds those of several streams in float32."""

Dims = tuple[int, ...]


@dataclass(frozen=True)
class Range:
    """Smallest, usual and largest extent."""

    minimum: int
    optimum: int
    maximum: int

    def __post_init__(self) -> None:
        if not 0 <= self.minimum <= self.optimum <= self.maximum:
            raise ValueError(f"range: expected ascending extents, got {self.minimum}, {self.optimum}, {self.maximum}")


@dataclass(frozen=True)
class Profile:
    """``name``: ``decode``, ``prefill``, ``step`` or ``compress``. ``symbols``: the contract's, to their ranges."""

    name: str
    symbols: Mapping[str, Range]

    def shapes(self, symbolic: Sequence[str | int]) -> tuple[Dims, Dims, Dims]:
        """Smallest, usual and largest shape of a tensor."""
        ranges = [self._range(extent) for extent in symbolic]
        return (
            tuple(r.minimum for r in ranges),
            tuple(r.optimum for r in ranges),
            tuple(r.maximum for r in ranges),
        )

    def _range(self, extent: str | int) -> Range:
        if isinstance(extent, int):
            return Range(extent, extent, extent)
        if extent == "S+1":
            own = self.symbols["S"]
            return Range(own.minimum + 1, own.optimum + 1, own.maximum + 1)
        return self.symbols[extent]


def tensor_shapes(plan: CompressionPlan, config: ModelConfig, decoder: bool) -> dict[str, tuple[str | int, ...]]:
    """Symbolic shape of every input of the decoder, or of the compressor."""
    inputs = decoder_inputs(plan) if decoder else COMPRESSOR_INPUTS
    result: dict[str, tuple[str | int, ...]] = dict(inputs)
    for blocks, pools in (("Nf", full_pools(config)), ("Nc", compressed_pools(plan, config))):
        result |= {pool.name: (blocks, *pool.shape) for pool in pools}
    return result


def decoder_profiles(
    build: BuildConfig, plan: CompressionPlan, config: ModelConfig, plugins: bool
) -> tuple[Profile, ...]:
    """``decode`` and ``prefill``; for TensorRT-RTX one, ``step``, that holds what both do.

    Without plugins, decodes and each prefill chunk run apart, and inputs only a plugin reads have one entry. With them
    a step that holds any chunk is one call, whatever else it holds. TensorRT chooses its kernels for a profile's usual
    shapes; TensorRT-RTX compiles them for the shapes it meets, and each profile takes it as long to build as the first.
    """
    profiles = _decode_and_prefill(build, plan, config, plugins)
    return (_union("step", *profiles),) if build.backend == "tensorrt-rtx" else profiles


def _union(name: str, first: Profile, second: Profile) -> Profile:
    """The smallest profile that holds two; its usual extents are those of the second."""

    def hull(a: Range, b: Range) -> Range:
        return Range(min(a.minimum, b.minimum), b.optimum, max(a.maximum, b.maximum))

    return Profile(name, {symbol: hull(own, second.symbols[symbol]) for symbol, own in first.symbols.items()})


def _decode_and_prefill(
    build: BuildConfig, plan: CompressionPlan, config: ModelConfig, plugins: bool
) -> tuple[Profile, Profile]:
    longest = -(-build.max_seq_len // BLOCK_SIZE)
    batch, tokens = build.max_batch_size, build.max_num_tokens
    chunk = min(tokens, build.max_seq_len)
    one, none = Range(1, 1, 1), Range(0, 0, 0)
    sequences = Range(1, max(1, batch // 2), batch)
    tables = {
        "Mf": Range(1, min(2 + build.quantum // BLOCK_SIZE, longest) if not plan.compresses else 1, longest),
        "Mc": Range(1, max(1, longest // 2), longest),
        **_pools(build, plan, config),
    }
    decode = {**tables, "T": sequences, "S": sequences, "Nd": one, "Sp": one, "Qm": one, "P": one, "Wf": one, "Wc": one}
    decode["N"] = sequences
    usual = max(1, min(chunk, 512))
    prefill = {**decode, "T": Range(1, usual, chunk), "S": one, "Qm": Range(1, usual, chunk), "N": Range(1, 1, chunk)}
    if plugins:
        decode |= {"Nd": sequences, "Sp": none, "Qm": none, "P": none}
        several = Range(1, 1, batch)
        prefill |= {"T": Range(1, usual, tokens), "S": several, "Sp": several, "N": Range(1, 1, tokens)}
        prefill |= {"Nd": Range(0, 0, max(0, batch - 1))}
    return Profile("decode", decode), Profile("prefill", prefill)


def compressor_profiles(build: BuildConfig, plan: CompressionPlan, config: ModelConfig) -> tuple[Profile, ...]:
    """``compress``. Its usual number of blocks is above one: with one, the builder of TensorRT-RTX 1.7 fails."""
    return (Profile("compress", {"N": Range(1, 4, COMPRESSED_AT_ONCE), **_pools(build, plan, config)}),)


def _pools(build: BuildConfig, plan: CompressionPlan, config: ModelConfig) -> dict[str, Range]:
    """Blocks of both tiers: usually what a full batch of the longest sequences needs, at most what a tensor holds."""
    sizes = CacheSizes.plan(
        build,
        KvCacheConfig(),
        plan.compresses,
        full_block_bytes(config, 2),
        compressed_block_bytes(plan, config, 2),
        sliding_window=config.sliding_window,
    )
    full = _blocks(sizes.full_blocks, full_pools(config))
    return {"Nf": full, "Nc": _blocks(sizes.compressed_blocks, compressed_pools(plan, config))}


def _blocks(usual: int, pools: Sequence[PoolSpec]) -> Range:
    largest = max((math.prod(pool.shape) for pool in pools), default=1)
    most = max(2, LARGEST_VOLUME // largest)
    return Range(2, min(max(usual, 2), most), most)
