"""Does a compressed cache raise the throughput of a whole model on a GPU, and lower its memory?

The shape of Llama-2-7B with random weights, 161 tokens in and 338 out (the averages of ShareGPT, as in the MiniCache
paper), both sides within one budget of GPU memory. Ours runs all requests of a batch through `LLM.generate`, greedily;
Hugging Face's `generate` runs them as one padded batch. A batch that does not fit a side's memory is none of its rows.
"""

from __future__ import annotations

import gc
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import common
import numpy as np
import torch
import typer
from gpu import gpu_description, require_gpu
from kernel_plans import plan_of_pairs
from reporting import JsonFile, write_report

from minicache_trt.backends.torch_kernels import CudaEngine, cuda_library
from minicache_trt.build import build_engine
from minicache_trt.cli.console import stderr
from minicache_trt.compression.methods import METHODS, make_plan
from minicache_trt.compression.plan import CompressionPlan
from minicache_trt.config import BLOCK_SIZE, BuildConfig, KvCacheConfig, ModelConfig
from minicache_trt.engine_directory import read_engine
from minicache_trt.errors import UserError
from minicache_trt.runtime.llm import LLM
from minicache_trt.runtime.request import SamplingParams

PROMPT, NEW = 161, 338
MEMORY_BATCH = 128
"""Batch whose memory is reported; the paper's."""
HF, UNCOMPRESSED = "Hugging Face", "full"
SHARE = 0.9
"""Of the memory left beside the weights, for the cache."""


@dataclass(frozen=True)
class Row:
    """A side at one batch; ``seconds`` of the whole batch, prefill included.

    ``memory``: most bytes PyTorch held at once; of our cache, which is allocated beforehand, only blocks in use count.
    """

    side: str
    batch: int
    seconds: float
    memory: int

    @property
    def throughput(self) -> float:
        """Generated tokens per second."""
        return self.batch * NEW / self.seconds


def prompts(batch: int, vocabulary: int) -> list[list[int]]:
    ids: list[list[int]] = np.random.default_rng(0).integers(10, vocabulary, (batch, PROMPT)).tolist()
    return ids


def cache_config(budget: int, allocated: int, batch: int) -> KvCacheConfig:
    """All of the budget that weights and a tenth of the rest leave, prompts of a whole batch at once."""
    # A prompt holds a block more than a decode with a window of one block.
    prefills = -(-batch // max(1, (PROMPT + NEW) // BLOCK_SIZE - 2)) + 1
    return KvCacheConfig(max_bytes=int(SHARE * (budget - allocated)), active_prefills=prefills)


def build(folder: Path, model: str, name: str, batch: int) -> Path:
    """An engine without weights."""

    def configure(config: ModelConfig) -> tuple[CompressionPlan, BuildConfig]:
        plan = make_plan(config, name) if name in METHODS else plan_of_pairs(name, config)
        length = -(-(PROMPT + NEW) // BLOCK_SIZE) * BLOCK_SIZE
        return plan, BuildConfig(batch, length, max(8192, batch), backend="cuda")

    return build_engine(
        model, folder / name.replace(" ", "-"), configure, load_format="dummy", overwrite=True
    ).directory


def ours(name: str, directory: Path, batches: list[int], budget: int) -> Iterator[Row]:
    engine = CudaEngine(directory, read_engine(directory))
    with torch.inference_mode():
        for weight in engine.weights.values():
            if weight.dim() == 2:
                weight.normal_(std=0.02)
    config = cache_config(budget, torch.cuda.memory_allocated(), max(batches))
    llm = LLM.from_engine(engine, kv_cache_config=config)
    params = SamplingParams(max_tokens=NEW, temperature=0.0, ignore_eos=True)
    llm.generate(prompts(min(batches), engine.model.vocab_size), SamplingParams(max_tokens=4, ignore_eos=True))
    for batch in batches:
        requests = prompts(batch, engine.model.vocab_size)
        llm.generate(requests, params)  # captures the steps of this batch
        torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        outputs = llm.generate(requests, params)
        seconds = time.perf_counter() - start
        if any(len(output.outputs[0].token_ids) != NEW for output in outputs):
            raise UserError(f"{name}, batch {batch}: a request ended early")
        statistics = llm.statistics
        unused = llm.cache_sizes.num_bytes - statistics.full_bytes_used - statistics.compressed_bytes_used
        row = Row(name, batch, seconds, torch.cuda.max_memory_allocated() - unused)
        if statistics.preemptions:
            stderr.print(f"{name}, batch {batch}: {statistics.preemptions} preemptions, the cache is full")
        yield row


def hugging_face(checkpoint: Path, batches: list[int], device: torch.device) -> Iterator[Row]:
    """``generate`` in fp16 with its default attention and cache."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with device:
        config = AutoConfig.from_pretrained(checkpoint)
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float16).eval()
    for batch in batches:
        ids = torch.tensor(prompts(batch, config.vocab_size), device=device)
        options = {"min_new_tokens": NEW, "max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
        try:
            model.generate(
                ids[:1],
                attention_mask=torch.ones_like(ids[:1]),
                **{**options, "min_new_tokens": 4, "max_new_tokens": 4},
            )
            torch.cuda.reset_peak_memory_stats()
            start = time.perf_counter()
            model.generate(ids, attention_mask=torch.ones_like(ids), **options)
            torch.cuda.synchronize()
        except torch.OutOfMemoryError:
            stderr.print(f"{HF}, batch {batch}: out of memory")
            return
        yield Row(HF, batch, time.perf_counter() - start, torch.cuda.max_memory_allocated())


def free() -> None:
    gc.collect()
    torch.cuda.empty_cache()


def summary(rows: list[Row]) -> list[list[object]]:
    """A line per side: its peak against both baselines, and its memory at the paper's batch against Hugging Face's."""
    peaks: dict[str, Row] = {}
    for row in rows:
        if row.side not in peaks or row.throughput > peaks[row.side].throughput:
            peaks[row.side] = row
    memory = {row.side: row.memory for row in rows if row.batch == MEMORY_BATCH}
    lines: list[list[object]] = []
    for side, peak in peaks.items():
        line: list[object] = [side, peak.batch, f"{peak.throughput:.0f}"]
        for other in (HF, UNCOMPRESSED):
            line.append(f"{peak.throughput / peaks[other].throughput:.2f}x" if other in peaks else "")
        line.append(f"{memory[side] / 2**30:.1f}" if side in memory else "")
        known = side in memory and HF in memory
        line.append(f"{100 * (memory[side] / memory[HF] - 1):+.0f} %" if known else "")
        lines.append(line)
    return lines


def measure(rows: list[Row], side: Callable[[], Iterator[Row]]) -> None:
    for row in side():
        stderr.print(f"{row.side}, batch {row.batch}: {row.throughput:.0f} tokens/s, {row.memory / 2**30:.1f} GiB")
        rows.append(row)
    free()


def main(
    model: Annotated[str, typer.Option(help="Preset whose shape is measured.")] = "llama2-7b",
    plans: Annotated[str, typer.Option(help="Ours: methods, or int4 pairs.")] = "full,kivi4,minicache4,int4 pairs",
    batches: Annotated[str, typer.Option(help="Requests at a time, comma-separated.")] = "1,16,64,128,256,384,512",
    budget_gb: Annotated[float, typer.Option(help="GPU memory of either side, in 10^9 bytes.")] = 80.0,
    quick: Annotated[bool, typer.Option(help="Two plans, three batches.")] = False,
    cache_dir: common.CacheDir = common.CACHE_DIR,
    json_file: JsonFile = None,
) -> None:
    """Peak throughput over the batch, and memory at batch 128, against Hugging Face and against no compression."""
    device = require_gpu()
    cuda_library()
    names = ["full", "kivi4"] if quick else plans.split(",")
    sizes = [64, MEMORY_BATCH, 256] if quick else sorted(int(word) for word in batches.split(","))
    total = torch.cuda.get_device_properties(device).total_memory
    budget = min(int(budget_gb * 1e9), total)
    torch.cuda.set_per_process_memory_fraction(budget / total)
    rows: list[Row] = []
    folder = cache_dir / "end-to-end"
    checkpoint = folder
    for name in names:
        directory = build(folder, model, name, max(sizes))
        checkpoint = directory / "checkpoint"
        measure(rows, lambda name=name, directory=directory: ours(name, directory, sizes, budget))  # type: ignore[misc]
    measure(rows, lambda: hugging_face(checkpoint, sizes, device))
    shutil.rmtree(folder, ignore_errors=True)
    results = {
        **gpu_description(device),
        "budget_bytes": budget,
        "rows": [{**asdict(r), "tokens_per_second": r.throughput} for r in rows],
    }
    columns = (
        "side",
        "batch at peak",
        "tokens/s",
        "over Hugging Face",
        "over full",
        "GiB at 128",
        "against Hugging Face",
    )
    title = f"{model}, random weights, fp16, {PROMPT} tokens in and {NEW} out, {budget / 1e9:.0f} GB"
    write_report(title, columns, summary(rows), results, json_file)


if __name__ == "__main__":
    common.run(main)
