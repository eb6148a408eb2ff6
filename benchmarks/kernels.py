"""How close to the GPU's limits do the kernels come?

One row per operation and shape. What is bound by memory is compared with the bandwidth of a large copy, prefill with
PyTorch's flash attention on the same shape without compression, both measured in the same run. The baseline of decode
is the fastest fp16 attention at hand over the same context: PyTorch's flash or cuDNN attention on contiguous keys and
values, FlashInfer's paged decode where it is installed.

With ``--once`` nothing is timed: each call runs once, in an NVTX range with its name, for Nsight Compute.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import product
from typing import Annotated

import common
import numpy as np
import torch
import typer
from gpu import copy_bandwidth, gpu_description, require_gpu, seconds
from kernel_baselines import decode_baselines, flash_prefill_seconds
from kernel_costs import Context, compress_bytes, decode_bytes, prefill_flops, restore_bytes
from kernel_plans import MODELS, PLANS, plan_of, random_cache
from kernel_selection import OPS, Selection
from reporting import JsonFile, write_report
from torch import Tensor

from minicache_trt.backends.torch_kernels import cuda_library
from minicache_trt.cli.console import stderr
from minicache_trt.compression.plan import CompressionPlan
from minicache_trt.config import BLOCK_SIZE, ModelConfig
from minicache_trt.contract import StreamLayout, plan_layout
from minicache_trt.kernels.cache import KernelCache
from minicache_trt.kernels.graphs import CudaRecorder
from minicache_trt.kernels.library import KernelLibrary
from minicache_trt.kernels.steps import StepInputs, StepShape

DTYPE = torch.float16
BATCHES, CONTEXTS = (1, 8, 32, 128), (1024, 4096, 16384, 65536)
QUICK_DECODES = ((1, 4096), (32, 4096), (128, 1024), (8, 16384))
CHUNK = 2048


@dataclass(frozen=True)
class Row:
    """One measurement; ``amount`` bytes or operations, ``ceiling`` of the same per second."""

    op: str
    model: str
    plan: str
    shape: str
    seconds: float
    amount: int
    ceiling: float
    baseline: str = ""
    baseline_seconds: float | None = None

    @property
    def name(self) -> str:
        return ", ".join((self.op, self.model, self.plan, self.shape))

    @property
    def share(self) -> float:
        """Of the ceiling."""
        return self.amount / self.seconds / self.ceiling

    def cells(self) -> list[object]:
        speedup = (
            "" if self.baseline_seconds is None else f"{self.baseline_seconds / self.seconds:.2f}x {self.baseline}"
        )
        return [
            self.op,
            self.model,
            self.plan,
            self.shape,
            f"{1e6 * self.seconds:.1f}",
            f"{self.amount / self.seconds / 1e9:.0f}",
            f"{100 * self.share:.0f} %",
            speedup,
        ]


@dataclass(frozen=True)
class Bench:
    """What every measurement shares; ``repeats`` 0: each call runs once, and its time is not a number."""

    library: KernelLibrary
    device: torch.device
    bandwidth: float
    repeats: int
    selection: Selection

    def captured(self, name: str, run: Callable[[], Tensor]) -> float:
        """Seconds of a call without what launching its kernels one by one costs."""
        with torch.inference_mode():
            if self.repeats > 0:
                return seconds(CudaRecorder()(run), self.repeats)
            torch.cuda.nvtx.range_push(name)
            run()
            torch.cuda.synchronize()
            torch.cuda.nvtx.range_pop()
            return math.nan

    def row(self, run: Callable[[], Tensor], row: Row) -> Row:
        """The row with its time."""
        return replace(row, seconds=self.captured(row.name, run))

    def cache(self, config: ModelConfig, plan: CompressionPlan, full: int, compressed: int) -> KernelCache:
        cache = KernelCache(self.library, config, plan, self.device, DTYPE)
        cache.tensors = random_cache(config, plan, full, compressed, self.device, DTYPE)
        return cache


def decode_step(inputs: StepInputs, context: Context, batch: int) -> StepInputs:
    """Every sequence with blocks of its own, shuffled."""
    tensors, full = inputs.tensors, -(-context.exact // BLOCK_SIZE)
    compressed = context.compressed // BLOCK_SIZE
    rng = np.random.default_rng(0)
    for name, columns in (("full_table", full), ("compressed_table", compressed)):
        if columns:
            ids = rng.permutation(batch * columns).astype(np.int32) + 1
            tensors[name].copy_(torch.from_numpy(ids.reshape(batch, columns)))
    tensors["context_len"].fill_(context.compressed + context.exact)
    tensors["compressed_len"].fill_(context.compressed)
    return inputs


def decode_row(bench: Bench, model: str, name: str, batch: int, tokens: int, baseline: tuple[str, float]) -> Row:
    config = MODELS[model]
    plan = plan_of(name, config)
    context = Context.of(tokens, plan.compresses)
    full, compressed = -(-context.exact // BLOCK_SIZE), max(1, context.compressed // BLOCK_SIZE)
    cache = bench.cache(config, plan, batch * full + 1, batch * compressed + 1)
    step = decode_step(StepInputs(StepShape.of_decodes(batch, full, compressed), bench.device), context, batch)
    q = torch.randn(batch, config.num_heads * config.head_dim, dtype=DTYPE, device=bench.device)
    amount = decode_bytes(config, plan, batch, context)
    row = Row("decode", model, name, f"batch {batch}, context {tokens}", 0.0, amount, bench.bandwidth, *baseline)
    return bench.row(lambda: cache.read(step, q, 0), row)


def decode_rows(bench: Bench, shapes: list[tuple[int, int]]) -> Iterator[Row]:
    """Shapes that do not fit the GPU's memory are left out, with a line that says so."""
    for model, (batch, tokens) in product(bench.selection.models, shapes):
        baseline: tuple[str, float] | None = None if bench.repeats else ("", math.nan)
        for name in bench.selection.plans:
            try:
                if baseline is None:
                    baseline = decode_baselines(MODELS[model], batch, tokens, bench.device, bench.repeats)
                yield decode_row(bench, model, name, batch, tokens, baseline)
            except torch.OutOfMemoryError:
                stderr.print(f"left out, too large for this GPU: {model}, {name}, batch {batch}, context {tokens}")
            gc.collect()
            torch.cuda.empty_cache()


def codec_rows(bench: Bench, blocks: int) -> Iterator[Row]:
    """Compressing ``blocks`` blocks of one stream, and restoring them for its first layer."""
    for model, name in product(bench.selection.models, [name for name in bench.selection.plans if name != "full"]):
        config = MODELS[model]
        plan = plan_of(name, config)
        cache = bench.cache(config, plan, blocks + 1, blocks + 1)
        for layer in range(1, config.num_layers):
            cache.tensors[f"kv.{layer}"] = torch.randn_like(cache.tensors["kv.0"])
        ids = torch.arange(1, blocks + 1, dtype=torch.int32, device=bench.device)
        for layout in plan_layout(plan, config):
            if layout.stream.layers[0] != 0:
                continue
            what = f"{layout.stream.part} stream, {blocks} blocks"
            row = Row("restore", model, name, what, 0.0, restore_bytes(layout, blocks), bench.bandwidth)
            if row.op in bench.selection.ops:
                yield bench.row(partial(cache.restore, layout.stream.part, 0, ids, ids), row)
            row = replace(row, op="compress", amount=compress_bytes(layout, blocks))
            if row.op in bench.selection.ops:
                yield bench.row(partial(_compressed, cache, layout, ids), row)


def _compressed(cache: KernelCache, layout: StreamLayout, ids: Tensor) -> Tensor:
    cache.compress_stream(layout.index, ids, ids, ids)
    return ids


def prefill_rows(bench: Bench, histories: tuple[int, ...]) -> Iterator[Row]:
    """A chunk behind histories, against PyTorch's flash attention over the same tokens uncompressed."""
    plans = [name for name in ("full", "kivi4") if name in bench.selection.plans]
    for model, name, history in product(bench.selection.models, plans, histories):
        config = MODELS[model]
        plan = plan_of(name, config)
        compressed = history if plan.compresses else 0
        exact = CHUNK + history - compressed
        cache = bench.cache(config, plan, exact // BLOCK_SIZE + 1, compressed // BLOCK_SIZE + 1)
        columns = max(1, compressed // BLOCK_SIZE)
        step = StepInputs(StepShape(CHUNK, 1, 0, exact // BLOCK_SIZE, columns, CHUNK, 1), bench.device)
        step.tensors["query_start"].copy_(torch.tensor([0, CHUNK], dtype=torch.int32))
        decode_step(step, Context(compressed, exact), 1)
        q = torch.randn(CHUNK, config.num_heads * config.head_dim, dtype=DTYPE, device=bench.device)
        flash = (
            flash_prefill_seconds(config, history, CHUNK, bench.device, bench.repeats) if bench.repeats else math.nan
        )
        amount = prefill_flops(config, history, CHUNK)
        what = f"{CHUNK} tokens behind {history}"
        row = Row("prefill", model, name, what, 0.0, amount, amount / flash, "torch flash", flash)
        yield bench.row(partial(cache.read, step, q, 0), row)


def rows_of(bench: Bench, quick: bool) -> Iterator[Row]:
    """Everything selected, one after another."""
    ops = bench.selection.ops
    if "decode" in ops:
        yield from decode_rows(bench, list(QUICK_DECODES) if quick else list(product(BATCHES, CONTEXTS)))
    if "restore" in ops or "compress" in ops:
        yield from codec_rows(bench, 256 if quick else 1024)
    if "prefill" in ops:
        yield from prefill_rows(bench, (0, 14336))


def main(
    quick: Annotated[bool, typer.Option(help="Few shapes.")] = False,
    repeats: Annotated[int, typer.Option(min=3, help="Measurements of each call, after one that warms up.")] = 20,
    once: Annotated[bool, typer.Option(help="Run each call once, in an NVTX range, and time nothing.")] = False,
    ops: Annotated[str, typer.Option(help=f"Some of {', '.join(OPS)}, comma-separated.")] = "",
    models: Annotated[str, typer.Option(help=f"Some of {', '.join(MODELS)}, comma-separated.")] = "",
    plans: Annotated[str, typer.Option(help=f"Some of {', '.join(PLANS)}, comma-separated.")] = "",
    json_file: JsonFile = None,
) -> None:
    """Achieved bytes or operations per second of every kernel over the ceiling measured in the same run."""
    selection = Selection.of(ops, models, plans)
    device = require_gpu()
    library = cuda_library()
    bandwidth = math.nan if once else copy_bandwidth(device)
    bench = Bench(library, device, bandwidth, 0 if once else repeats, selection)
    if not once:
        stderr.print(f"copy bandwidth {bench.bandwidth / 1e9:.0f} GB/s")
    rows: list[Row] = []
    for row in rows_of(bench, quick):
        stderr.print(row.name if once else " ".join(map(str, row.cells())))
        rows.append(row)
    if once:
        return
    columns = ("op", "model", "plan", "shape", "us", "GB/s or GFLOP/s", "of ceiling", "against baseline")
    results = {
        **gpu_description(device),
        "library": library.version,
        "copy_bytes_per_second": bench.bandwidth,
        "rows": [asdict(row) for row in rows],
    }
    write_report("GPU kernels, fp16, one layer", columns, [row.cells() for row in rows], results, json_file)


if __name__ == "__main__":
    common.run(main)
