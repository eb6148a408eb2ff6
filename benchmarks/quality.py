"""What does each method cost in quality, for how much memory?

`minicache-trt eval`'s perplexity and repeat, as a result file that says which machine and commit it comes from. From
position 128 on every token reads the history it would have been decoded with, compressed beyond the exact window.

* *perplexity* of text in windows of 512 tokens; tokens 129 to 511 of each are scored;
* *recall*: 150 random tokens repeated up to 512; everything from the second repeated token on is scored, by accuracy
  and by negative log-likelihood (nll, in nats). It fails when the cache no longer tells tokens apart.

Intervals are 95 % bootstrap intervals over sequences, for differences from ``full`` on the same sequences.
"""

from __future__ import annotations

import importlib.util
import platform
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from common import REPOSITORY, run
from reporting import JsonFile, write_report
from transformers import AutoTokenizer

from minicache_trt.checkpoint.resolve import resolve_config
from minicache_trt.cli.console import progress_bars
from minicache_trt.compression.methods import CALIBRATED_METHODS, MERGING_METHODS, MethodOptions, make_plan
from minicache_trt.compression.plan import CompressionPlan
from minicache_trt.compression.plan_json import load_plan
from minicache_trt.config import BuildConfig, ModelConfig
from minicache_trt.errors import UserError
from minicache_trt.evaluation.contenders import FULL, Contender, build_for
from minicache_trt.evaluation.evaluate import evaluate
from minicache_trt.evaluation.report import span, summarize
from minicache_trt.evaluation.scoring import exact_prefix
from minicache_trt.evaluation.tasks import Settings, make_cells
from minicache_trt.evaluation.text import TokenizedText, read_documents

DEMO = REPOSITORY / "examples" / "demo_model"
COLUMNS = ("method", "cache smaller by", "perplexity", "change [95 %]", "recall [95 %]", "recall nll [95 %]")


def demo_text() -> tuple[str, list[str]]:
    """Documents the bundled demo model has not seen: its training script's held-out files of the standard library."""
    spec = importlib.util.spec_from_file_location("demo_train", DEMO / "train.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["demo_train"] = module
    spec.loader.exec_module(module)
    _, held = module.load_corpus()
    return f"held-out standard library (Python {platform.python_version()})", held.code + held.topics


def plan_for(method: str, merge_start: int | None, config: ModelConfig) -> CompressionPlan:
    """A method's plan, or the one in a file."""
    if method.endswith(".json"):
        return load_plan(Path(method)).validate(config)
    if method in CALIBRATED_METHODS:
        raise UserError(f"method {method!r} is calibrated, so it has no plan of its own", "give a calibrated plan.json")
    return make_plan(config, method, MethodOptions(merge_start=merge_start if method in MERGING_METHODS else None))


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
    name, documents = demo_text() if text is None else (text.name, read_documents(text))
    config = resolve_config(str(checkpoint))
    tokenized = TokenizedText(AutoTokenizer.from_pretrained(checkpoint), documents, config.vocab_size)
    settings = Settings(length=length, windows=windows, examples=segments)
    build = build_for(length, 64, BuildConfig(weights=weights))
    cells = make_cells(("perplexity", "repeat"), tokenized, settings, exact_prefix(build))
    names = [FULL, *(method for method in methods.split(",") if method != FULL)]
    contenders = [Contender(Path(m).name, checkpoint, plan_for(m, merge_start, config), build) for m in names]

    with progress_bars() as report:
        summary = summarize(evaluate(contenders, cells, None, threads, None, report))
    results = [figures(line) for line in summary]
    model = checkpoint.resolve().name if checkpoint.name != "checkpoint" else "demo model"
    counts = ", ".join(f"{len(cells[task][0].examples)} {what}" for task, what in
                       (("perplexity", f"windows of {length} tokens"), ("repeat", "repeated segments")))  # fmt: skip
    title = f"Quality: {model}, {text_name or name}; {counts}, {weights} weights"
    write_report(title, COLUMNS, [row(line) for line in results], results, json)


def figures(line: dict[str, Any]) -> dict[str, Any]:
    """The result file's names for one method's figures; the ratio is that of one sequence of full length."""
    text, recall, memory = line["tasks"]["perplexity"], line["tasks"]["repeat"], line["memory"]
    found = {key: value for key, value in text.items() if key.startswith("perplexity")}
    for ours, theirs in (("recall", "accuracy"), ("recall_nll", "nll")):
        found |= {key.replace(theirs, ours, 1): value for key, value in recall.items() if key.startswith(theirs)}
    sizes = {"ratio": memory["sequence_ratio"], "sequence_bytes": memory["sequence_bytes"], "bits": memory["bits"]}
    return {"method": line["method"], **sizes, "allocated_ratio": memory["ratio"], **found}


def row(line: dict[str, Any]) -> list[str]:
    return [
        line["method"],
        f"{line['ratio']:.2f}x",
        f"{line['perplexity']:.2f}",
        span(line, "perplexity_change", "+.1%"),
        span(line, "recall", ".1%"),
        span(line, "recall_nll", ".3f"),
    ]


if __name__ == "__main__":
    run(main)
