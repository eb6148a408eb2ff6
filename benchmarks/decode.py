"""How fast do we decode, against Hugging Face ``generate`` with the same checkpoint?

Prefill is not timed: every step counts from one token of each sequence to the next. Both sides are greedy, hold a full
cache of their own kind, and run on the same number of threads.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable
from functools import partial
from typing import Annotated, Any

import numpy as np
import torch
import typer
from common import CACHE_DIR, CacheDir, Shape, alternate, engine_directory, random_llama, run
from reporting import JsonFile, write_report

from minicache_trt.benchmark.huggingface import faster_attention
from minicache_trt.benchmark.measure import same_tokens
from minicache_trt.benchmark.ours import Ours
from minicache_trt.benchmark.timings import Ratio, Timings
from minicache_trt.build import load_engine
from minicache_trt.cli.console import stderr
from minicache_trt.config import BuildConfig, KvCacheConfig
from minicache_trt.runtime.llm import LLM

TARGETS = {("full/fp32", 1): 1.2, ("full/fp32", 8): 1.7, ("full/int4", 1): 3.5}


def main(
    context: Annotated[int, typer.Option(help="Tokens of each prompt.")] = 512,
    new_tokens: Annotated[int, typer.Option(help="Tokens generated after it; the first one is prefill's.")] = 33,
    batch_sizes: Annotated[str, typer.Option(help="Comma-separated.")] = "1,8",
    engines: Annotated[str, typer.Option(help="Comma-separated method/weights.")] = "full/fp32,full/int4",
    kv_heads: Annotated[int, typer.Option(help="KV heads; 16 is one per query head.")] = 16,
    layers: Annotated[int, typer.Option(help="Layers of the random Llama.")] = 16,
    hidden: Annotated[int, typer.Option(help="Its hidden size; heads have 64 components.")] = 1024,
    rounds: Annotated[int, typer.Option(help="Paired measurements.")] = 5,
    threads: Annotated[int, typer.Option(help="CPU threads of either side.")] = 1,
    cache_dir: CacheDir = CACHE_DIR,
    json: JsonFile = None,
) -> None:
    """Print decode throughput beside Hugging Face's."""
    torch.set_num_threads(threads)
    sizes = [int(size) for size in batch_sizes.split(",")]
    shape = dataclasses.replace(
        Shape(), num_hidden_layers=layers, hidden_size=hidden, num_attention_heads=hidden // 64,
        intermediate_size=hidden * 11 // 4, num_key_value_heads=kv_heads,
    )  # fmt: skip
    checkpoint = random_llama(cache_dir, shape)
    contenders: dict[str, Ours] = {}
    for name in engines.split(","):
        method, weights = name.split("/")
        stderr.print(f"building {name}")
        # One step prefills all prompts, so that every decode step has all sequences.
        build = BuildConfig(max(sizes), context + new_tokens, max(sizes) * context, weights)
        engine = load_engine(engine_directory(cache_dir, checkpoint, method, build), num_threads=threads)
        contenders[name] = Ours(
            LLM.from_engine(engine, kv_cache_config=KvCacheConfig(active_prefills=max(sizes), enable_block_reuse=False))
        )
    prompts = np.random.default_rng(0).integers(5, shape.vocab_size, (max(sizes), context)).tolist()
    theirs, attention = faster_attention(str(checkpoint), prompts[:1])
    rows, results = [], []
    for size in sizes:
        stderr.print(f"batch {size}, tokens per second")
        some = prompts[:size]
        calls: dict[str, Callable[[], Timings]] = {"transformers": partial(theirs.run, some, new_tokens)}
        for name, ours in contenders.items():
            ours.run(some, 3)
            calls[name] = partial(ours.run, some, new_tokens)
        runs = alternate(calls, rounds, lambda timings: timings.decode_rate)
        if any(len(timings.steps) != new_tokens - 1 for taken in runs.values() for timings in taken):
            raise RuntimeError(f"expected {new_tokens - 1} steps of {size} sequences")
        samples = {name: [timings.decode_rate for timings in taken] for name, taken in runs.items()}
        baseline = samples["transformers"]
        rows.append([f"batch {size}: transformers fp32", statistics.median(baseline), "1", "", ""])
        results.append(record(size, "transformers", baseline, None, None, attention))
        for name in contenders:
            # With other weights or history the model is another one; tokens of a random model part at once.
            same = same_tokens(runs[name][-1].tokens, runs["transformers"][-1].tokens) if name == "full/fp32" else None
            ratio = Ratio.of(samples[name], baseline)
            target = TARGETS.get((name, size))
            rows.append(
                [
                    f"batch {size}: {name}",
                    statistics.median(samples[name]),
                    ratio,
                    target or "",
                    "" if same is None else f"{same:.0%}",
                ]
            )
            results.append(record(size, name, samples[name], ratio, target, same))
    columns = ("contender", "tokens/s", "ratio (range)", "target", "tokens as transformers'")
    title = f"Decode at context {context}, {shape.name}, {threads} thread(s)"
    write_report(title, columns, rows, results, json)


def record(
    batch: int, name: str, samples: list[float], ratio: Ratio | None, target: float | None, extra: Any
) -> dict[str, Any]:
    """One contender's JSON; ``extra`` is the share of equal tokens, or transformers' speed per attention."""
    return {
        "batch": batch,
        "contender": name,
        "tokens_per_second": samples,
        "ratio": ratio and dataclasses.asdict(ratio),
        "target": target,
        "attention_probe" if ratio is None else "same_tokens": extra,
    }


if __name__ == "__main__":
    run(main)
