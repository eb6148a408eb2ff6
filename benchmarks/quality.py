"""What does each method cost in quality, for how much memory?

Two measurements, both through the engine's own cache: from position 128 on tokens are decoded one by one, so each
scored token is predicted from compressed history beyond the exact window.

* *perplexity* of text in windows of 512 tokens; tokens 129 to 511 of each are scored;
* *recall*: 150 random tokens repeated up to 512; everything from the second repeated token on is scored, by accuracy
  and by negative log-likelihood (nll, in nats). It fails when the cache no longer tells tokens apart.

Intervals are 95 % bootstrap intervals over sequences, for differences from ``full`` on the same sequences.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from common import REPOSITORY, run
from numpy.typing import NDArray
from reporting import JsonFile, write_report
from transformers import AutoTokenizer

from minicache_trt.checkpoint.resolve import resolve_config
from minicache_trt.cli.console import stderr
from minicache_trt.compression.methods import CALIBRATED_METHODS, MERGING_METHODS, MethodOptions, make_plan
from minicache_trt.compression.plan import CompressionPlan
from minicache_trt.compression.plan_json import load_plan
from minicache_trt.compression.size import ratio, sequence_bytes
from minicache_trt.config import BLOCK_SIZE, BuildConfig, KvCacheConfig, ModelConfig
from minicache_trt.errors import UserError
from minicache_trt.runtime.llm import LLM

DEMO = REPOSITORY / "examples" / "demo_model"
SEGMENT = 150
SEPARATOR = "\n\0"
LOGIT_BYTES = 1 << 29
"""Logits kept at a time decide how many sequences run together."""

Array = NDArray[np.float64]
Tokens = list[list[int]]


@dataclasses.dataclass(frozen=True)
class Scores:
    """Per sequence: summed nll, tokens predicted right, tokens scored."""

    nll: Array
    right: Array
    count: Array

    def mean_nll(self, chosen: NDArray[np.int64]) -> Array:
        """Nll per token over rows of sequences ``[samples, n]``."""
        result: Array = self.nll[chosen].sum(-1) / self.count[chosen].sum(-1)
        return result

    def accuracy(self, chosen: NDArray[np.int64]) -> Array:
        result: Array = self.right[chosen].sum(-1) / self.count[chosen].sum(-1)
        return result


def demo_text() -> tuple[str, list[str]]:
    """Documents the bundled demo model has not seen: its training script's held-out files of the standard library."""
    spec = importlib.util.spec_from_file_location("demo_train", DEMO / "train.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["demo_train"] = module
    spec.loader.exec_module(module)
    _, held = module.load_corpus()
    return f"held-out standard library (Python {platform.python_version()})", held.code + held.topics


def text_windows(tokenizer: Any, documents: list[str], length: int, count: int) -> Tokens:
    """``count`` windows of ``length`` tokens, evenly spread over the text; each begins with the tokenizer's BOS."""
    ids = tokenizer(documents, add_special_tokens=False, verbose=False)["input_ids"]
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    flat = np.concatenate([np.array([*row, *end]) for row in ids])
    begin = _begin(tokenizer)
    size = length - len(begin)
    count = min(count, len(flat) // size)
    starts = np.linspace(0, len(flat) - size, count).astype(int)
    return [[*begin, *flat[start : start + size].tolist()] for start in starts]


def repeated_segments(tokenizer: Any, vocab_size: int, length: int, count: int) -> Tokens:
    """Random ordinary tokens, repeated."""
    ordinary = np.setdiff1d(np.arange(min(vocab_size, len(tokenizer))), tokenizer.all_special_ids)
    begin, rng = _begin(tokenizer), np.random.default_rng(0)
    return [[*begin, *np.resize(rng.choice(ordinary, SEGMENT), length - len(begin)).tolist()] for _ in range(count)]


def _begin(tokenizer: Any) -> list[int]:
    return [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]


def score(llm: LLM, sequences: Tokens, first: int, batch: int, progress: Callable[[int], None]) -> Scores:
    """Score tokens ``first`` to the end; the first 128 tokens are the prompt (they attend exactly in any case)."""
    columns: list[tuple[float, int, int]] = []
    prompt = llm.engine.build.window + BLOCK_SIZE
    for start in range(0, len(sequences), batch):
        some = sequences[start : start + batch]
        for tokens, logits in zip(some, llm.score(some, [prompt] * len(some), start=first - 1), strict=True):
            logits, targets = logits[:-1], np.array(tokens[first:])
            peak = logits.max(-1, keepdims=True)
            total = np.log(np.exp(logits - peak).sum(-1, dtype=np.float64)) + peak[:, 0]
            nll = total - logits[np.arange(len(targets)), targets]
            columns.append((float(nll.sum()), int((logits.argmax(-1) == targets).sum()), len(targets)))
        progress(start + len(some))
    return Scores(*np.array(columns, np.float64).T)


def plan_for(method: str, merge_start: int | None, config: ModelConfig) -> CompressionPlan:
    """A method's plan, or the one in a file."""
    if method.endswith(".json"):
        return load_plan(Path(method)).validate(config)
    if method in CALIBRATED_METHODS:
        raise UserError(f"method {method!r} is calibrated, so it has no plan of its own", "give a calibrated plan.json")
    return make_plan(config, method, MethodOptions(merge_start=merge_start if method in MERGING_METHODS else None))


def interval(values: Array) -> tuple[float, float]:
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)


def summary(text: Scores, recall: Scores, full: tuple[Scores, Scores], samples: int = 2000) -> dict[str, Any]:
    """Figures of one method; intervals of differences resample the sequences of both methods alike."""
    rng, everything = np.random.default_rng(0), np.arange(len(text.nll))[None]
    chosen = rng.integers(0, len(text.nll), (samples, len(text.nll)))
    among, all_recall = rng.integers(0, len(recall.nll), (samples, len(recall.nll))), np.arange(len(recall.nll))[None]
    change = np.expm1(text.mean_nll(chosen) - full[0].mean_nll(chosen))
    return {
        "perplexity": float(np.exp(text.mean_nll(everything)[0])),
        "perplexity_interval": interval(np.exp(text.mean_nll(chosen))),
        "perplexity_change": float(np.expm1(text.mean_nll(everything) - full[0].mean_nll(everything))[0]),
        "perplexity_change_interval": interval(change),
        "recall": float(recall.accuracy(all_recall)[0]),
        "recall_interval": interval(recall.accuracy(among)),
        "recall_change_interval": interval(recall.accuracy(among) - full[1].accuracy(among)),
        "recall_nll": float(recall.mean_nll(all_recall)[0]),
        "recall_nll_interval": interval(recall.mean_nll(among)),
    }


def main(
    checkpoint: Annotated[Path, typer.Option(help="Hugging Face checkpoint directory.")] = DEMO / "checkpoint",
    text: Annotated[Path | None, typer.Option(help="Documents separated by newline and NUL; default, with the demo "
                                              "checkpoint: files it was not trained on.")] = None,
    methods: Annotated[str, typer.Option(help="Comma-separated; or plan files (.json).")] = "full,kivi4,kivi2,mean,"
    "minicache,minicache4",
    merge_start: Annotated[int | None, typer.Option(help="First merged layer; default half of them.")] = None,
    length: Annotated[int, typer.Option(help="Tokens of a sequence.")] = 512,
    windows: Annotated[int, typer.Option(help="Windows of text.")] = 96,
    segments: Annotated[int, typer.Option(help="Repeated segments.")] = 64,
    weights: Annotated[str, typer.Option(help="Weight format.")] = "fp32",
    text_name: Annotated[str | None, typer.Option(help="How results call the text; default the file's name.")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads; default all.")] = None,
    json: JsonFile = None,
) -> None:  # fmt: skip
    """Print perplexity and recall of compression methods beside their memory."""
    if text is None and checkpoint.resolve() != (DEMO / "checkpoint").resolve():
        raise UserError("which text is held out is only known for the demo checkpoint", "give --text FILE")
    name, documents = demo_text() if text is None else (text.name, text.read_text(encoding="utf-8").split(SEPARATOR))
    tokenizer, config = AutoTokenizer.from_pretrained(checkpoint), resolve_config(str(checkpoint))
    sequences = text_windows(tokenizer, documents, length, windows)
    repeated = repeated_segments(tokenizer, config.vocab_size, length, segments)
    limits = BuildConfig(max_seq_len=length, weights=weights)
    batch = max(1, min(64, LOGIT_BYTES // (4 * config.vocab_size * length)))
    limits = dataclasses.replace(limits, max_batch_size=batch, max_num_tokens=batch * (limits.window + BLOCK_SIZE))
    first = limits.window + BLOCK_SIZE + 1
    scores: dict[str, tuple[Scores, Scores]] = {}
    rows, results = [], []
    for method in ["full", *(m for m in methods.split(",") if m != "full")]:
        plan = plan_for(method, merge_start, config)
        llm = LLM(
            checkpoint, plan=plan, build_config=limits, num_threads=threads,
            kv_cache_config=KvCacheConfig(active_prefills=batch),
        )  # fmt: skip

        def progress(done: int, method: str = method) -> None:
            stderr.print(f"{method}: {done} sequences")

        # The first repeated token cannot be known: nothing says that the segment ends there.
        pair = (
            score(llm, sequences, first, batch, progress),
            score(llm, repeated, len(_begin(tokenizer)) + SEGMENT + 1, batch, progress),
        )
        scores[method] = pair
        figures = summary(*pair, scores["full"])
        memory = {
            "ratio": ratio(plan, config, length, limits.window),
            "sequence_bytes": sequence_bytes(plan, config, length, limits.window),
        }
        results.append({"method": Path(method).name, **memory, **figures})
        rows.append(row(Path(method).name, results[-1]))
    columns = ("method", "cache smaller by", "perplexity", "change [95 %]", "recall [95 %]", "recall nll [95 %]")
    title = f"{checkpoint.resolve().name if checkpoint.name != 'checkpoint' else 'demo model'}, {text_name or name}"
    counts = f"{len(sequences)} windows of {length} tokens, {len(repeated)} repeated segments"
    write_report(f"Quality: {title}; {counts}, {weights} weights", columns, rows, results, json)


def row(method: str, figures: dict[str, Any]) -> list[str]:
    def span(name: str, form: str) -> str:
        low, high = figures[f"{name}_interval"]
        return f"{figures[name]:{form}} [{low:{form}}, {high:{form}}]"

    return [
        method,
        f"{figures['ratio']:.2f}x",
        f"{figures['perplexity']:.2f}",
        span("perplexity_change", "+.1%"),
        span("recall", ".1%"),
        span("recall_nll", ".3f"),
    ]


if __name__ == "__main__":
    run(main)
