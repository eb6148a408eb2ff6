"""What benchmarks share: random checkpoints, engines, steps, paired timing."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

import numpy as np
import typer

from minicache_trt.benchmark import timings
from minicache_trt.build import build_engine, load_engine
from minicache_trt.cli.console import print_error, stderr
from minicache_trt.compression.methods import make_plan
from minicache_trt.compression.plan import CompressionPlan
from minicache_trt.config import BLOCK_SIZE, BuildConfig, ModelConfig
from minicache_trt.contract import full_pools
from minicache_trt.errors import UserError
from minicache_trt.runtime.batch import Batch, prefill_past, work_list
from minicache_trt.runtime.demotion import DemotionRule, blocks_for

Sample = TypeVar("Sample")

REPOSITORY = Path(__file__).resolve().parents[1]

CacheDir = Annotated[Path, typer.Option(help="Folder for random checkpoints and the engines built from them.")]
CACHE_DIR = REPOSITORY / "build" / "benchmarks"


@dataclasses.dataclass(frozen=True)
class Shape:
    """Shape of a random Llama checkpoint; the names are transformers' own."""

    num_hidden_layers: int = 16
    hidden_size: int = 1024
    intermediate_size: int = 2816
    num_attention_heads: int = 16
    num_key_value_heads: int = 16
    vocab_size: int = 32000
    max_position_embeddings: int = 4096

    @property
    def name(self) -> str:
        heads = f"{self.num_attention_heads}-{self.num_key_value_heads}"
        return f"llama-{self.num_hidden_layers}x{self.hidden_size}-{self.intermediate_size}-h{heads}-v{self.vocab_size}"


def random_llama(cache_dir: Path, shape: Shape) -> Path:
    """A float32 Llama checkpoint with transformers' random initial weights; made once, then reused."""
    directory = cache_dir / shape.name
    if (directory / "model.safetensors").exists():
        return directory
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    # Without special tokens neither side stops early or masks one.
    config = LlamaConfig(**dataclasses.asdict(shape), bos_token_id=None, eos_token_id=None)
    LlamaForCausalLM(config).save_pretrained(directory)
    return directory


def engine_directory(cache_dir: Path, checkpoint: Path, method: str, build: BuildConfig) -> Path:
    """A freshly built engine of a checkpoint, in a directory named after what it is."""
    output = cache_dir / f"{checkpoint.name}-{method}-{build.weights}"

    def configure(config: ModelConfig) -> tuple[CompressionPlan, BuildConfig]:
        return make_plan(config, method), build

    return build_engine(str(checkpoint), output, configure, overwrite=True).directory


def open_engine(directory: Path, num_threads: int) -> Any:
    """An engine on the ONNX Runtime backend, which also shows its pools (``.pool``)."""
    return load_engine(directory, num_threads=num_threads, backend="onnxruntime")


def fill_pools(engine: Any, full_blocks: int, compressed_blocks: int, used: int = 64) -> int:
    """Allocate pools, fill up to ``used`` blocks of each tier with random history, and return the bytes allocated."""
    allocated: int = engine.allocate(full_blocks, compressed_blocks)
    rng = np.random.default_rng(0)
    sources = block_ids(full_blocks, min(used, full_blocks - 1))
    for pool in full_pools(engine.model):
        for block in sources:
            engine.pool(pool.name)[block] = rng.standard_normal(pool.shape, dtype=np.float32)
    if engine.plan.compresses:
        targets = block_ids(compressed_blocks, min(used, compressed_blocks - 1))
        for start in range(0, len(targets), 4):
            chunk = targets[start : start + 4]
            engine.compress(np.resize(sources, len(chunk)), chunk, np.arange(len(chunk), dtype=np.int32) + start)
    return allocated


def block_ids(pool_blocks: int, count: int) -> np.ndarray[Any, np.dtype[np.int32]]:
    """``count`` distinct blocks of a pool, spread evenly over it and shuffled; never block 0."""
    ids = np.linspace(1, pool_blocks - 1, count).astype(np.int32)
    return np.random.default_rng(1).permutation(ids).astype(np.int32)


def decode_step(engine: Any, sequences: int, context: int, full_blocks: int, compressed_blocks: int) -> Batch:
    """A step that decodes token ``context`` of each of ``sequences`` sequences, as the runtime would pack it."""
    build, position = engine.build, context - 1
    c = DemotionRule(build.window, build.quantum).compressed_len(position, 0) if engine.plan.compresses else 0
    full, compressed = blocks_for(context - c), c // BLOCK_SIZE
    full_table = block_ids(full_blocks, sequences * full).reshape(sequences, full)
    compressed_table = np.zeros((sequences, max(1, compressed)), np.int32)
    if compressed:
        compressed_table[:] = block_ids(compressed_blocks, sequences * compressed).reshape(sequences, compressed)
    rows = np.arange(sequences, dtype=np.int32)
    each = np.ones(sequences, np.int32)
    return Batch(
        input_ids=rows + 5,
        positions=each * np.int32(position),
        query_start=np.arange(sequences + 1, dtype=np.int32),
        context_len=each * np.int32(context),
        compressed_len=each * np.int32(c),
        slot_mapping=(full_table[:, -1] * BLOCK_SIZE + (position - c) % BLOCK_SIZE).astype(np.int32),
        full_table=full_table,
        compressed_table=compressed_table,
        full_work=work_list(full_table),
        compressed_work=work_list(compressed_table),
        decode_rows=rows,
        prefill_rows=np.zeros((0, 0), np.int32),
        prefill_past=prefill_past([]),
        logit_index=rows,
    )


def run(main: Callable[..., None]) -> None:
    """A script's command line; what the user can mend is said in a line."""
    app = typer.Typer(pretty_exceptions_enable=False, context_settings={"help_option_names": ["-h", "--help"]})
    app.command()(main)
    try:
        app()
    except UserError as error:
        print_error(error)
        raise SystemExit(1) from error


def seconds_per_call(call: Callable[[], object], calls: int) -> float:
    """Median time of one call."""
    times = []
    for _ in range(calls):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def alternate(
    contenders: Mapping[str, Callable[[], Sample]], rounds: int, value: Callable[[Sample], float] = float
) -> dict[str, list[Sample]]:
    """`minicache_trt.benchmark.timings.alternate` that tells after each round the ``value`` of its samples."""

    def report(done: int, samples: dict[str, list[Sample]]) -> None:
        line = "  ".join(f"{name} {value(values[-1]):.4g}" for name, values in samples.items())
        stderr.print(f"round {done}/{rounds}: {line}")

    return timings.alternate(contenders, rounds, report)
