"""How fast do we decode, against Hugging Face ``generate`` with the same checkpoint?

Prefill is not timed: on our side `Statistics.decode_seconds`, on the other the time from the first new token a streamer
sees to the last. Both sides are greedy, hold a full cache of their own kind, and run on the same number of threads.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Annotated, Any

import numpy as np
import torch
import typer
from common import CACHE_DIR, CacheDir, Ratio, Shape, alternate, engine_directory, random_llama, run
from reporting import JsonFile, write_report
from transformers import AutoModelForCausalLM
from transformers.generation.streamers import BaseStreamer

from minicache_trt.build import load_engine
from minicache_trt.cli.console import stderr
from minicache_trt.config import BuildConfig, KvCacheConfig
from minicache_trt.runtime.llm import LLM
from minicache_trt.runtime.request import SamplingParams

TARGETS = {("full/fp32", 1): 1.2, ("full/fp32", 8): 1.7, ("full/int4", 1): 3.5}
Prompts = list[list[int]]


class Stamps(BaseStreamer):
    """Time of every token `generate` reports; the first report is the prompt."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: object) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


class HuggingFace:
    """``generate`` of transformers in float32."""

    def __init__(self, checkpoint: str, attention: str) -> None:
        self.model: Any = AutoModelForCausalLM.from_pretrained(
            checkpoint, dtype=torch.float32, attn_implementation=attention
        )
        self.tokens: Prompts = []

    def __call__(self, prompts: Prompts, new_tokens: int) -> float:
        """Decoded tokens per second."""
        stamps, ids = Stamps(), torch.tensor(prompts)
        output = self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            min_new_tokens=new_tokens,
            max_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=0,
            streamer=stamps,
        )
        self.tokens = output[:, ids.shape[1] :].tolist()
        return len(prompts) * (new_tokens - 1) / (stamps.times[-1] - stamps.times[1])


class Ours:
    """`LLM.generate`."""

    def __init__(self, llm: LLM) -> None:
        self.llm = llm
        self.tokens: Prompts = []

    def __call__(self, prompts: Prompts, new_tokens: int) -> float:
        """Decoded tokens per second."""
        outputs = self.llm.generate(prompts, SamplingParams(max_tokens=new_tokens, temperature=0.0, ignore_eos=True))
        self.tokens = [output.outputs[0].token_ids for output in outputs]
        steps = self.llm.statistics
        if steps.decode_tokens != len(prompts) * (new_tokens - 1):
            raise RuntimeError(f"expected steps of {len(prompts)} sequences, {steps.decode_tokens} tokens were decoded")
        return steps.decode_tokens_per_second


def faster_attention(checkpoint: str, prompts: Prompts) -> tuple[HuggingFace, dict[str, float]]:
    """Hugging Face's model with the faster of its two attention implementations."""
    models = {name: HuggingFace(checkpoint, name) for name in ("sdpa", "eager")}
    for model in models.values():
        model(prompts, 4)
    samples = alternate({name: partial(model, prompts, 16) for name, model in models.items()}, 3)
    speeds = {name: statistics.median(values) for name, values in samples.items()}
    return models[max(speeds, key=lambda name: speeds[name])], speeds


def same_tokens(mine: Prompts, theirs: Prompts) -> float:
    """Share of positions with the same token."""
    return float((np.array(mine) == np.array(theirs)).mean())


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
        contenders[name] = Ours(LLM.from_engine(engine, kv_cache_config=KvCacheConfig(active_prefills=max(sizes))))
    prompts = np.random.default_rng(0).integers(5, shape.vocab_size, (max(sizes), context)).tolist()
    theirs, attention = faster_attention(str(checkpoint), prompts[:1])
    rows, results = [], []
    for size in sizes:
        stderr.print(f"batch {size}, tokens per second")
        some = prompts[:size]
        calls: dict[str, Callable[[], float]] = {"transformers": partial(theirs, some, new_tokens)}
        for name, ours in contenders.items():
            ours(some, 3)
            calls[name] = partial(ours, some, new_tokens)
        samples = alternate(calls, rounds)
        baseline = samples["transformers"]
        rows.append([f"batch {size}: transformers fp32", statistics.median(baseline), "1", "", ""])
        results.append(record(size, "transformers", baseline, None, None, attention))
        for name, ours in contenders.items():
            # With other weights or history the model is another one; tokens of a random model part at once.
            same = same_tokens(ours.tokens, theirs.tokens) if name == "full/fp32" else None
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
