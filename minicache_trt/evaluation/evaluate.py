"""All tasks on all contenders, one engine at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from minicache_trt.evaluation.contenders import Contender, Memory
from minicache_trt.evaluation.scoring import Scores, exact_prefix, score_examples
from minicache_trt.evaluation.tasks import Cell
from minicache_trt.runtime.llm import LLM

Report = Callable[[str, int, int], None]
"""Takes a stage, what is done of it and its total."""

Harness = Callable[[LLM], dict[str, Any]]
"""Runs lm-eval-harness on an engine; see `minicache_trt.evaluation.harness`."""


@dataclass(frozen=True)
class CellScores:
    """Scores of the examples of one `Cell`."""

    length: int
    depth: float | None
    scores: Scores


@dataclass(frozen=True)
class Result:
    """One contender: its memory, scores by task, and what lm-eval-harness says."""

    name: str
    memory: Memory
    tasks: Mapping[str, tuple[CellScores, ...]]
    harness: dict[str, Any] = field(default_factory=dict)

    def scores(self, task: str) -> Scores:
        """All cells of a task, one after the other."""
        return Scores.joined([cell.scores for cell in self.tasks[task]])


def run_tasks(
    llm: LLM, cells: Mapping[str, Sequence[Cell]], report: Callable[[int], None]
) -> dict[str, tuple[CellScores, ...]]:
    """Scores of every cell of every task; ``report`` takes the number of examples done.

    Examples of all tasks run together, as many as the engine takes at a time.
    """
    prefix, batch = exact_prefix(llm.engine.build), llm.engine.build.max_batch_size
    everything = [example for of_task in cells.values() for cell in of_task for example in cell.examples]
    if not everything:
        return {}
    scores = score_examples(llm, everything, prefix, batch, llm.engine.model.vocab_size, report)
    done, found = 0, dict[str, tuple[CellScores, ...]]()
    for task, of_task in cells.items():
        rows = []
        for cell in of_task:
            own = scores.part(done, done + len(cell.examples))
            rows.append(CellScores(cell.length, cell.depth, own))
            done += len(cell.examples)
        found[task] = tuple(rows)
    return found


def evaluate(
    contenders: Sequence[Contender],
    cells: Mapping[str, Sequence[Cell]],
    harness: Harness | None,
    threads: int | None,
    backend: str | None,
    report: Report,
) -> list[Result]:
    """Run everything; engines that are built here are gone when the next one starts.

    Parameters
    ----------
    contenders : sequence of Contender
        The first is what the others are compared with.
    cells : mapping
        Of `minicache_trt.evaluation.tasks.make_cells`.
    harness : callable, optional
    threads : int, optional
        CPU threads; default all.
    backend : str, optional
    report : callable

    Raises
    ------
    UserError
        An engine cannot be built or run.
    """
    total = sum(len(cell.examples) for of_task in cells.values() for cell in of_task)
    results = []
    for contender in contenders:
        report(contender.name, 0, total)
        with contender.open(threads, backend) as llm:

            def progress(done: int, name: str = contender.name) -> None:
                report(name, done, total)

            scores = run_tasks(llm, cells, progress)
            found = harness(llm) if harness is not None else {}
            results.append(Result(contender.name, Memory.of(llm), scores, found))
    return results
