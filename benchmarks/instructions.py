"""How much of a GPU's bandwidth do the kernels' instructions leave within reach?

Runs the PTX of the kernels on the emulated GPU, which counts what it runs: nothing is timed, and no GPU is needed.
A multiprocessor issues four instructions of warps a cycle at most, so a kernel that needs one instruction for B bytes
reaches at most ``4 x B x multiprocessors x clock`` bytes per second, however fast the memory is. Instructions are those
of PTX, of which ptxas makes fewer.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Annotated

import common
import torch
import typer
from kernel_costs import Context, compress_bytes, decode_bytes, restore_bytes
from kernel_names import kernel_names
from kernel_plans import MODELS, PLANS, plan_of, random_cache
from kernels import DTYPE, decode_step
from reporting import JsonFile, write_report

from minicache_trt.compression.plan import CompressionPlan
from minicache_trt.config import BLOCK_SIZE, ModelConfig
from minicache_trt.contract import plan_layout
from minicache_trt.errors import UserError
from minicache_trt.kernels.cache import KernelCache
from minicache_trt.kernels.emulated import EmulatedRuntime
from minicache_trt.kernels.library import KernelLibrary
from minicache_trt.kernels.steps import StepInputs, StepShape

ISSUED_PER_CYCLE = 4
"""Instructions of warps that a multiprocessor issues: one per scheduler (sm_80 to sm_120)."""
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Row:
    """One kernel's part in an operation; ``amount``: bytes the operation must move."""

    op: str
    model: str
    plan: str
    kernel: str
    amount: int
    instructions: int
    shared_turns: int
    shared_turns_at_best: int
    shared_bytes: int

    def cells(self, multiprocessors: int, clock: float) -> list[object]:
        bytes_each = self.amount / self.instructions
        conflicts = self.shared_turns / self.shared_turns_at_best if self.shared_turns_at_best else 1.0
        return [
            self.op,
            self.model,
            self.plan,
            self.kernel,
            self.instructions,
            f"{bytes_each:.2f}",
            f"{bytes_each * ISSUED_PER_CYCLE * multiprocessors * clock / 1e9:.0f}",
            f"{conflicts:.2f}",
            f"{self.shared_bytes / 1024:.1f}",
        ]


@dataclass(frozen=True)
class Counter:
    """Counts what calls do."""

    library: KernelLibrary
    runtime: EmulatedRuntime

    @classmethod
    def built(cls) -> Counter:
        folder = common.REPOSITORY / "build" / "plugins-emulated"
        script = common.REPOSITORY / "build_scripts" / "build_plugins.sh"
        result = subprocess.run([script, "--emulated", "--output", folder], capture_output=True, text=True, check=False)
        if result.returncode != 0:
            cause, _, hint = result.stderr.strip().partition("\nhint: ")
            raise UserError(cause.removeprefix("error: "), hint or "see the output of build_scripts/build_plugins.sh")
        library = folder / "libminicache_emulated.so"
        return cls(KernelLibrary(library), EmulatedRuntime(library))

    def rows(self, op: str, model: str, plan: str, amount: int, call: Callable[[], object]) -> Iterator[Row]:
        self.runtime.reset()
        call()
        statistics = self.runtime.statistics()
        for name, counts in zip(kernel_names([*statistics]), statistics.values(), strict=True):
            yield Row(
                op,
                model,
                plan,
                name.partition("<")[0],
                amount,
                sum(counts["instructions"].values()),
                counts["shared_wavefronts"],
                counts["shared_ideal"],
                counts["shared_bytes"],
            )

    def cache(self, config: ModelConfig, plan: CompressionPlan, full: int, compressed: int) -> KernelCache:
        cache = KernelCache(self.library, config, plan, CPU, DTYPE)
        cache.tensors = random_cache(config, plan, full, compressed, CPU, DTYPE)
        for layer in range(1, config.num_layers):
            cache.tensors[f"kv.{layer}"] = torch.randn_like(cache.tensors["kv.0"])
        return cache


def decode_rows(counter: Counter, model: str, name: str, batch: int, tokens: int) -> Iterator[Row]:
    """A row for each kernel, then one for all of them."""
    config = MODELS[model]
    plan = plan_of(name, config)
    context = Context.of(tokens, plan.compresses)
    full, compressed = -(-context.exact // BLOCK_SIZE), max(1, context.compressed // BLOCK_SIZE)
    cache = counter.cache(config, plan, batch * full + 1, batch * compressed + 1)
    step = decode_step(StepInputs(StepShape.of_decodes(batch, full, compressed), CPU), context, batch)
    q = torch.randn(batch, config.num_heads * config.head_dim, dtype=DTYPE)
    amount = decode_bytes(config, plan, batch, context)
    rows = [*counter.rows("decode", model, name, amount, lambda: cache.read(step, q, 0))]
    yield from rows
    turns, best = sum(row.shared_turns for row in rows), sum(row.shared_turns_at_best for row in rows)
    instructions, shared = sum(row.instructions for row in rows), max(row.shared_bytes for row in rows)
    yield Row("decode", model, name, "all", amount, instructions, turns, best, shared)


def codec_rows(counter: Counter, model: str, name: str, blocks: int) -> Iterator[Row]:
    config = MODELS[model]
    plan = plan_of(name, config)
    cache = counter.cache(config, plan, blocks + 1, blocks + 1)
    ids = torch.arange(1, blocks + 1, dtype=torch.int32)
    for layout in plan_layout(plan, config) if plan.compresses else ():
        part, amount = layout.stream.part, restore_bytes(layout, blocks)
        if layout.stream.layers[0] != 0:
            continue
        restore: Callable[[], object] = lambda part=part: cache.restore(part, 0, ids, ids)  # noqa: E731
        yield from counter.rows(f"restore {part}", model, name, amount, restore)
        compress: Callable[[], object] = lambda index=layout.index: cache.compress_stream(index, ids, ids, ids)  # noqa: E731
        yield from counter.rows(f"compress {part}", model, name, compress_bytes(layout, blocks), compress)


def main(
    context: Annotated[int, typer.Option(min=64, help="Tokens of each sequence that is decoded.")] = 1024,
    batch: Annotated[int, typer.Option(min=1, help="Sequences that are decoded.")] = 8,
    blocks: Annotated[int, typer.Option(min=1, help="Cache blocks that are compressed and restored.")] = 16,
    multiprocessors: Annotated[int, typer.Option(min=1, help="Of the GPU; an H200 has 132.")] = 132,
    clock: Annotated[float, typer.Option(min=0.1, help="Of the GPU, in GHz; an H200 reaches 1.98.")] = 1.98,
    json_file: JsonFile = None,
) -> None:
    """Bytes per instruction of every kernel, and the bandwidth they bound."""
    counter = Counter.built()
    rows: list[Row] = []
    for model in MODELS:
        for name in PLANS:
            rows += decode_rows(counter, model, name, batch, context)
    for name in PLANS:
        rows += codec_rows(counter, "Llama-3-8B 32/8/128", name, blocks)
    columns = (
        "op",
        "model",
        "plan",
        "kernel",
        "instructions",
        "bytes each",
        "GB/s at most",
        "conflicts",
        "shared KiB",
    )
    cells = [row.cells(multiprocessors, clock * 1e9) for row in rows]
    results = {"library": counter.library.version, "rows": [asdict(row) for row in rows]}
    title = (
        f"Instructions of the kernels' PTX, fp16, one layer; {batch} decodes behind {context} tokens; "
        f"GB/s at most: {multiprocessors} x {clock} GHz"
    )
    write_report(title, columns, cells, results, json_file)


if __name__ == "__main__":
    common.run(main)
