"""What does serving many requests at once gain, and what does the runtime around the engine cost?

* *streams*: requests of mixed lengths, many at once through ``generate_async``, and one after the other. Outputs of the
  two are compared; where they part, the logits of the tokens chosen together, alone and teacher-forced, tell how far
  they were from the best ones. The runtime's share is everything but the time inside the engine's ``decode`` and
  ``compress``: scheduling, packing, sampling, text, and whatever else runs in the process. Both sides have the same
  engine, settings and requests, prompts included; "while all run" leaves out the end, when no request is left to take
  the place of one that has ended.
* *scarce*: requests with long answers, in a cache of a quarter of the bytes they would use together.
* *prefix*: time to first token of a second prompt that begins as a first one did, over that of the first.
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from common import CACHE_DIR, REPOSITORY, CacheDir, Shape, engine_directory, open_engine, random_llama, run
from reporting import JsonFile, write_report
from serving_runs import Run, Work, open_llm, run_work

from minicache_trt.cli.console import quiet_transformers, stderr
from minicache_trt.config import BuildConfig, KvCacheConfig
from minicache_trt.errors import UserError
from minicache_trt.runtime.llm import LLM
from minicache_trt.units import format_bytes

DEMO = REPOSITORY / "examples" / "demo_model" / "checkpoint"
SHAPE = Shape()
PARTS = ("streams", "scarce", "prefix")
PREFIX, SUFFIX = 1000, 24


def differences(llm: LLM, work: Work, alone: Run, together: Run) -> dict[str, Any]:
    """How many outputs differ, and how far below the best logit their tokens are, as a share of the logits' range."""
    parts = [index for index, output in enumerate(alone.outputs) if output != together.outputs[index]]
    worst = 0.0
    for index in parts:
        prompt, output = work.prompts[index], together.outputs[index]
        (logits,) = llm.score([prompt + output], [len(prompt)], start=len(prompt) - 1)
        rows = logits[: len(output)]
        gaps = rows.max(-1) - rows[np.arange(len(output)), output]
        worst = max(worst, float((gaps / (rows.max(-1) - rows.min(-1))).max()))
    return {"streams": len(alone.outputs), "differing": len(parts), "largest_gap_share": worst}


def streams(
    directory: Path, threads: int, work: Work, num_streams: int, alone_requests: int, rounds: int
) -> tuple[list[list[object]], dict[str, Any]]:
    """Together and, the first ``alone_requests`` of them, one by one, in turn."""
    first = Work(work.prompts[:alone_requests], work.output_lens[:alone_requests])
    llm, spent = open_llm(directory, threads, KvCacheConfig(enable_block_reuse=False))
    alone, together = [], []
    for done in range(rounds):
        together.append(run_work(llm, spent, work, num_streams))
        alone.append(run_work(llm, spent, first, 1))
        rates = [side[-1].whole.tokens_per_second for side in (alone, together)]
        stderr.print(f"round {done + 1}/{rounds}: alone {rates[0]:.4g}, together {rates[1]:.4g} tokens/s")
    found = [differences(llm, first, a, b) for a, b in zip(alone, together, strict=True)]
    close(llm)
    rows: list[list[object]] = []
    for name, runs in (("one stream", alone), (f"{num_streams} streams", together)):
        rate = statistics.median(item.whole.tokens_per_second for item in runs)
        rows.append([name, f"{rate:.1f} tokens/s", _shares(runs, threads)])
    rate = statistics.median(item.busy.tokens_per_second for item in together)
    share = statistics.median(item.busy.runtime_share for item in together)
    rows.append([f"... while all {num_streams} run", f"{rate:.1f} tokens/s", f"runtime {share:.1%}"])
    pairs = list(zip(alone, together, strict=True))
    ratios = {
        "whole": statistics.median(b.whole.tokens_per_second / a.whole.tokens_per_second for a, b in pairs),
        "busy": statistics.median(b.busy.tokens_per_second / a.whole.tokens_per_second for a, b in pairs),
        "engine": statistics.median(_engine_per_token(a) / _engine_per_token(b) for a, b in pairs),
    }
    compared = f"{found[0]['differing']} of {len(first.prompts)} outputs differ"
    rows += [
        [f"{num_streams} streams over one", f"{ratios['whole']:.2f}x", compared],
        [f"... while all {num_streams} run", f"{ratios['busy']:.2f}x", ""],
        ["... if the runtime took no time", f"{ratios['engine']:.2f}x", ""],
    ]
    steps = [(a.full_step, b.full_step) for a, b in pairs if a.full_step and b.full_step]
    if steps:
        ratios["decode"] = statistics.median(num_streams * one / many for one, many in steps)
        one, many = (statistics.median(side) * 1e3 for side in zip(*steps, strict=True))
        rows.append(["... of decode steps alone", f"{ratios['decode']:.2f}x", f"{one:.2f} and {many:.2f} ms a step"])
    for name, runs in (("one stream", alone), (f"{num_streams} streams", together)):
        each = [item.per_token() for item in runs]
        parts = [f"{part} {statistics.median(item.get(part, 0.0) for item in each) * 1e3:.3f}" for part in each[0]]
        rows.append([f"ms per token, {name}", "", ", ".join(parts)])
    results = {
        "one": [item.figures() for item in alone],
        "together": [item.figures() for item in together],
        "ratio": ratios["whole"],
        "ratios": ratios,
        "differences": found,
    }
    return rows, results


def _engine_per_token(run: Run) -> float:
    return run.whole.engine_seconds / run.whole.tokens


def _shares(runs: list[Run], threads: int) -> str:
    share = f"runtime {statistics.median(item.whole.runtime_share for item in runs):.1%}"
    if threads > 1:  # other threads compute as well
        return share
    return f"{share}, of CPU time {statistics.median(item.runtime_cpu_share for item in runs):.1%}"


def scarce(directory: Path, threads: int, work: Work) -> tuple[list[list[object]], dict[str, Any]]:
    """A quarter of the bytes; every request must end as it should, with the tokens it has in a large cache."""
    llm, spent = open_llm(directory, threads, KvCacheConfig(enable_block_reuse=False))
    ample = run_work(llm, spent, work, len(work.prompts))
    used = llm.statistics.full_bytes_used + llm.statistics.compressed_bytes_used
    close(llm)
    llm, spent = open_llm(directory, threads, KvCacheConfig(used // 4, enable_block_reuse=False))
    tight = run_work(llm, spent, work, len(work.prompts))
    preemptions = llm.statistics.preemptions
    found = differences(llm, work, ample, tight)
    close(llm)
    rows: list[list[object]] = [
        ["cache for everybody", f"{ample.whole.tokens_per_second:.1f} tokens/s", format_bytes(used)],
        ["a quarter of it", f"{tight.whole.tokens_per_second:.1f} tokens/s", f"{preemptions} preemptions"],
        ["", f"{len(tight.outputs)} complete", f"{found['differing']} differ"],
    ]
    figures = {"ample": ample.figures(), "tight": tight.figures()}
    return rows, {"cache_bytes_used": used, "preemptions": preemptions, "differences": found, **figures}


def close(llm: LLM) -> None:
    """The end; every block must be back."""
    llm.shutdown()
    llm.check_integrity()


def prefix(directory: Path, threads: int, vocab_size: int, rounds: int) -> tuple[list[list[object]], dict[str, Any]]:
    """A new prefix each round."""
    llm, spent = open_llm(directory, threads, KvCacheConfig())
    rng = np.random.default_rng(1)
    run_work(llm, spent, Work([rng.integers(3, vocab_size, PREFIX).tolist()], [2]), 1)
    pairs = []
    for _ in range(rounds):
        shared = rng.integers(3, vocab_size, PREFIX).tolist()
        work = Work([shared + rng.integers(3, vocab_size, SUFFIX).tolist() for _ in range(2)], [8, 8])
        pairs.append(run_work(llm, spent, work, 1).first_tokens)
    close(llm)
    ratio = statistics.median(second / first for first, second in pairs)
    row: list[object] = [
        "second prompt's time to first token",
        f"{ratio:.1%} of the first's",
        f"{PREFIX} shared tokens",
    ]
    return [row], {"seconds": pairs, "ratio": ratio}


def main(
    checkpoint: Annotated[
        Path | None, typer.Option(help="Default: the bundled demo model. 'random': a random Llama of 213 M.")
    ] = None,
    method: Annotated[str, typer.Option(help="Compression method.")] = "kivi4",
    weights: Annotated[str, typer.Option(help="fp32, int8 or int4.")] = "fp32",
    parts: Annotated[str, typer.Option(help=f"Of {', '.join(PARTS)}.")] = ",".join(PARTS),
    num_streams: Annotated[int, typer.Option(help="Requests at once.")] = 64,
    num_requests: Annotated[int, typer.Option(help="Requests in all, in the place of each that ends the next.")] = 192,
    alone: Annotated[int | None, typer.Option(help="Of these also one by one.", show_default="all")] = None,
    mean: Annotated[int, typer.Option(help="Mean tokens of prompts and of answers.")] = 96,
    most: Annotated[int, typer.Option(help="Most tokens of a prompt, and of an answer.")] = 384,
    rounds: Annotated[int, typer.Option(help="Paired measurements.")] = 3,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 1,
    cache_dir: CacheDir = CACHE_DIR,
    json: JsonFile = None,
) -> None:
    """Print throughput, the runtime's share, and what prefixes and scarcity do."""
    quiet_transformers()
    chosen = parts.split(",")
    if not set(chosen) <= set(PARTS):
        raise UserError(f"--parts: expected some of {', '.join(PARTS)}, got {parts}")
    source = random_llama(cache_dir, SHAPE) if str(checkpoint) == "random" else checkpoint or DEMO
    limits = BuildConfig(
        max_batch_size=num_streams,
        max_seq_len=max(2 * most, PREFIX + SUFFIX + 64),
        max_num_tokens=1024,
        weights=weights,
    )
    directory = engine_directory(cache_dir, source, method, limits)
    vocab_size = open_engine(directory, threads).model.vocab_size
    work = Work.mixed(num_requests, vocab_size, mean, most)
    rows: list[list[object]] = []
    results: dict[str, Any] = {"prompt_lens": list(map(len, work.prompts)), "output_lens": work.output_lens}
    if "streams" in chosen:
        new, results["streams"] = streams(directory, threads, work, num_streams, alone or num_requests, rounds)
        rows += new
    if "scarce" in chosen:
        new, results["scarce"] = scarce(directory, threads, Work.growing(num_streams, vocab_size, most))
        rows += new
    if "prefix" in chosen:
        new, results["prefix"] = prefix(directory, threads, vocab_size, rounds + 2)
        rows += new
    title = f"Serving {source.name if checkpoint else 'the demo model'}, {method}, {weights}, {threads} thread(s)"
    write_report(title, ("what", "speed", "also"), rows, results, json)


if __name__ == "__main__":
    run(main)
