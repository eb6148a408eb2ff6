"""Who is compared: an engine as it is, and engines of the same checkpoint under other plans."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from minicache_trt.compression.plan import CompressionPlan
from minicache_trt.compression.size import (
    BASELINE_BYTES,
    baseline_sequence_bytes,
    constant_bytes,
    ratio,
    sequence_bytes,
)
from minicache_trt.config import BLOCK_SIZE, BuildConfig, KvCacheConfig
from minicache_trt.contract import compressed_block_bytes, full_block_bytes
from minicache_trt.errors import UserError
from minicache_trt.quantization.store import WeightOptions, weight_bytes
from minicache_trt.runtime.llm import LLM

DEFAULT_WEIGHTS = WeightOptions()
FULL = "full"
"""Name of the row everything is compared with: no compression."""


@dataclass(frozen=True)
class Contender:
    """One row of the comparison.

    Parameters
    ----------
    name : str
    source : Path
        Checkpoint directory, or engine directory when ``build`` is None.
    plan : CompressionPlan
    build : BuildConfig, optional
        Limits and weight format of the temporary engine that is built.
    weights : WeightOptions
        How its weights are computed.
    """

    name: str
    source: Path
    plan: CompressionPlan
    build: BuildConfig | None
    weights: WeightOptions = DEFAULT_WEIGHTS

    def open(self, threads: int | None, backend: str | None) -> LLM:
        """Build, if need be, and load.

        Raises
        ------
        UserError
            The engine cannot be built or loaded, or its checkpoint has no tokenizer.
        """
        llm = LLM(
            self.source,
            plan=self.plan,
            build_config=self.build,
            weight_options=self.weights,
            num_threads=threads,
            backend=backend,
            kv_cache_config=KvCacheConfig(enable_block_reuse=False),
        )
        if llm.tokenizer is None:
            raise no_tokenizer(self.source)
        return llm


def no_tokenizer(directory: Path) -> UserError:
    return UserError(
        f"{directory} has no tokenizer, so it takes no text", "add tokenizer.json to the checkpoint and try again"
    )


def check_names(contenders: Sequence[Contender]) -> None:
    """Raises `UserError` when two rows have one name."""
    names = [contender.name for contender in contenders]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"two rows would be called {name!r}", "rename a plan file, or leave one of them out")


@dataclass(frozen=True)
class Memory:
    """What an engine's cache takes, in 16-bit numbers where it is not compressed, whatever it computes in.

    Parameters
    ----------
    bits : float
        Bits of a number in the compressed tier, with scales, norms and retained tokens; 16 without compression.
    ratio : float
        16-bit keys and values of the sequences the pools are made for, over the bytes of all blocks allocated for
        them in both tiers: the exact window, unfinished and spare blocks are in it.
    sequence_ratio : float
        The same for one sequence that has just filled its last block, without spare blocks
        (`minicache_trt.compression.size.ratio`).
    sequence_bytes : int
        Its bytes.
    allocated_bytes : int
        Bytes the backend allocated for both tiers, in the type it computes in.
    constant_bytes : int
        Matrices of the plan, once per model; in none of the above.
    weights : str
        Weight format.
    weight_bytes : int
        Bytes of the weights in it; 0 where they are not known.
    """

    bits: float
    ratio: float
    sequence_ratio: float
    sequence_bytes: int
    allocated_bytes: int
    constant_bytes: int
    weights: str
    weight_bytes: int

    @classmethod
    def of(cls, llm: LLM) -> Memory:
        engine, sizes = llm.engine, llm.cache_sizes
        model, plan, build = engine.model, engine.plan, engine.build
        full, compressed = full_block_bytes(model, BASELINE_BYTES), compressed_block_bytes(plan, model, BASELINE_BYTES)
        allocated = sizes.full_blocks * full + sizes.compressed_blocks * compressed
        numbers = full // BASELINE_BYTES
        return cls(
            bits=8 * compressed / numbers if plan.compresses else 8.0 * BASELINE_BYTES,
            ratio=build.max_batch_size * baseline_sequence_bytes(model, build.max_seq_len) / allocated,
            sequence_ratio=ratio(plan, model, build.max_seq_len, build.window),
            sequence_bytes=sequence_bytes(plan, model, build.max_seq_len, build.window),
            allocated_bytes=sizes.num_bytes,
            constant_bytes=constant_bytes(plan),
            weights=build.weights,
            weight_bytes=0 if llm.directory is None else weight_bytes(llm.directory),
        )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


DEFAULTS = BuildConfig()


def build_for(length: int, batch: int, like: BuildConfig = DEFAULTS) -> BuildConfig:
    """Limits of the engines that are built here: ``batch`` sequences of whole blocks that hold ``length`` tokens.

    Weights, backend, window and quantum are those of ``like``.
    """
    whole = -(-length // BLOCK_SIZE) * BLOCK_SIZE
    tokens = max(DEFAULTS.max_num_tokens, batch)
    return replace(like, max_batch_size=batch, max_seq_len=whole, max_num_tokens=tokens)
