"""What do MiniCache's own choices cost and bring on a small model, and what do others in their place?

Each figure is a list of plans, scored on the same windows of text and the same repeated random segments through the
engine's cache, and written as JSON and as a picture. Intervals are 95 % paired bootstrap intervals over sequences.

    python benchmarks/paper_figures.py --checkpoint DIR --text FILE --calibration-text FILE \\
        --json-dir benchmarks/results --plot-dir docs/figures
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from common import run
from paper_plans import FIGURES, Variant, merged_pairs, states_of
from reporting import write_report
from transformers import AutoTokenizer

from minicache_trt.checkpoint.resolve import resolve_config
from minicache_trt.cli.console import stderr
from minicache_trt.compression.plan import CompressionPlan
from minicache_trt.config import ModelConfig
from minicache_trt.evaluation.contenders import FULL, Contender, build_for
from minicache_trt.evaluation.evaluate import Result, evaluate
from minicache_trt.evaluation.report import span, summarize
from minicache_trt.evaluation.scoring import exact_prefix
from minicache_trt.evaluation.tasks import TASKS, Settings, make_cells
from minicache_trt.evaluation.text import TokenizedText, read_documents
from minicache_trt.plots.figure import new_figure, save, set_title

TOLERATED = 0.05
LINES = ("#1f77b4", "#d95f02", "#2a9d3a", "#555555")


def main(
    checkpoint: Annotated[Path, typer.Option(help="Hugging Face checkpoint directory.")],
    text: Annotated[Path, typer.Option(help="Text the model has not seen, separated by newline and NUL.")],
    calibration_text: Annotated[Path, typer.Option(help="Other text, to calibrate on.")],
    json_dir: Annotated[Path, typer.Option(help="Folder of the results.")],
    plot_dir: Annotated[Path | None, typer.Option(help="Folder of the pictures; default none.")] = None,
    figures: Annotated[str, typer.Option(help=f"Comma-separated: {', '.join(FIGURES)}.")] = ",".join(FIGURES),
    tasks: Annotated[str, typer.Option(help="Comma-separated tasks of minicache-trt eval.")] = "perplexity,repeat",
    name: Annotated[str | None, typer.Option(help="How results call the model; default its folder's name.")] = None,
    length: Annotated[int, typer.Option(help="Tokens of a sequence.")] = 512,
    windows: Annotated[int, typer.Option(help="Windows of text.")] = 16,
    examples: Annotated[int, typer.Option(help="Examples of every other task.")] = 16,
    calibration_tokens: Annotated[int, typer.Option(help="Tokens to calibrate on.")] = 16384,
    threads: Annotated[int | None, typer.Option(help="CPU threads; default all.")] = None,
) -> None:
    """Measure and draw."""
    config, label = resolve_config(str(checkpoint)), name or checkpoint.resolve().name
    tokenized = TokenizedText(AutoTokenizer.from_pretrained(checkpoint), read_documents(text), config.vocab_size)
    settings = Settings(length=length, windows=windows, examples=examples)
    build = build_for(length, windows + examples * (len(tasks.split(",")) - 1))
    cells = make_cells(tasks.split(","), tokenized, settings, exact_prefix(build))
    states = states_of(checkpoint, config, "\n".join(read_documents(calibration_text)), calibration_tokens)
    known: dict[Any, Result] = {}

    def measured(key: Any, plan: CompressionPlan, title: str) -> Result:
        if key not in known:
            contender = Contender(title, checkpoint, plan, build)
            known[key] = evaluate([contender], cells, None, threads, None, lambda *_: None)[0]
            stderr.print(f"{title}: nll {known[key].scores('perplexity').nll.sum():.1f}")
        return known[key]

    full = measured(None, CompressionPlan(FULL), FULL)
    for chosen in figures.split(","):
        title, axis, make = FIGURES[chosen]
        variants = make(config, states)
        results = [measured(v.key, v.plan.validate(config), f"{chosen}: {v.series} {v.x}") for v in variants]
        if chosen == "pairs":
            variants.append(selected(config, variants, summarize([full, *results])))
            results.append(measured(variants[-1].key, variants[-1].plan, f"{chosen}: {variants[-1].x}"))
        summary = summarize([full, *results])
        report(
            chosen,
            f"{title}; {label}",
            axis,
            variants,
            summary,
            tasks.split(","),
            json_dir / f"paper-{chosen}-{label}.json",
        )
        if plot_dir is not None:
            plot_dir.mkdir(parents=True, exist_ok=True)
            draw(f"{title}; {label}", axis, variants, summary, tasks.split(","), plot_dir / f"{chosen}-{label}.png")


def selected(config: ModelConfig, variants: list[Variant], summary: list[dict[str, Any]]) -> Variant:
    """Every pair merged that cost less than 0.05 nats on every task when it was merged alone."""
    costs = [max(values["nll_change"] for values in line["tasks"].values()) for line in summary[1:]]
    firsts = [int(v.x.split("+")[0]) for v, cost in zip(variants, costs, strict=True) if cost < TOLERATED]
    return Variant(f"{len(firsts)} pairs", "all that bear it", merged_pairs(config, firsts))


def report(
    chosen: str,
    title: str,
    axis: str,
    variants: list[Variant],
    summary: list[dict[str, Any]],
    tasks: list[str],
    file: Path,
) -> None:
    """Table and JSON of one figure."""
    columns = ["series", axis, "bits", *(column for task in tasks for column in _columns(task))]
    rows = []
    for series, x, line in zip(
        [FULL, *(v.series for v in variants)], ["", *(v.x for v in variants)], summary, strict=True
    ):
        cells = [series, x, f"{line['memory']['bits']:.2f}"]
        for task in tasks:
            values, headline = line["tasks"][task], TASKS[task].headline
            if headline == "perplexity":
                cells += [f"{values['perplexity']:.2f}", span(values, "perplexity_change", "+.1%")]
            else:
                cells += [span(values, headline, ".1%"), f"{values['nll']:.3f}"]
        rows.append(cells)
    points = [{"series": FULL, "x": "", **summary[0]}]
    points += [{"series": v.series, "x": v.x, **line} for v, line in zip(variants, summary[1:], strict=True)]
    counts = ", ".join(f"{sum(c['examples'] for c in summary[0]['tasks'][t]['cells'])} {t}" for t in tasks)
    write_report(f"{title} ({counts} sequences)", columns, rows, {"figure": chosen, "points": points}, file)


def _columns(task: str) -> tuple[str, str]:
    return (
        ("perplexity", "change [95 %]") if TASKS[task].headline == "perplexity" else (f"{task} [95 %]", f"{task} nll")
    )


def draw(
    title: str, axis: str, variants: list[Variant], summary: list[dict[str, Any]], tasks: list[str], file: Path
) -> None:
    """A panel per task; a line per series."""
    figure = new_figure(4.8 * len(tasks), 4.2)
    places = list(dict.fromkeys(v.x for v in variants))
    for panel, task in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks, strict=True):
        headline = TASKS[task].headline
        name = "perplexity_change" if headline == "perplexity" else headline
        for color, series in zip(LINES, dict.fromkeys(v.series for v in variants), strict=False):
            lines = [(v.x, line) for v, line in zip(variants, summary[1:], strict=True) if v.series == series]
            figures = [line["tasks"][task] for _, line in lines]
            rows = [[100 * value for value in (f[name], *f[f"{name}_interval"])] for f in figures]
            spread = [[max(0.0, y - low) for y, low, _ in rows], [max(0.0, high - y) for y, _, high in rows]]
            at = [places.index(x) for x, _ in lines]
            panel.errorbar(at, [y for y, _, _ in rows], spread, marker="o", markersize=4, capsize=3, color=color,
                           label=series, linewidth=1.2)  # fmt: skip
        panel.axhline(100 * summary[0]["tasks"][task][name], color="#999999", linewidth=0.8, linestyle=":")
        long = max(map(len, places)) > 8
        panel.set_xticks(range(len(places)), places, rotation=30 if long else 0, ha="right" if long else "center")
        panel.set(
            title=task, xlabel=axis, ylabel="change of perplexity, %" if headline == "perplexity" else f"{headline}, %"
        )
        panel.grid(alpha=0.3)
    panel.legend(fontsize=8, frameon=False)
    set_title(figure, title)
    save(figure, file)


if __name__ == "__main__":
    run(main)
