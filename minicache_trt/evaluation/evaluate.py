"""All tasks on all contenders, one engine at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

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

    def to_dict(self) -> dict[str, Any]:
        """As JSON data, from which `from_dict` makes the same again."""
        tasks = {
            task: [
                {"length": c.length, "depth": c.depth, "scores": [x.tolist() for x in c.scores.columns()]} for c in of
            ]
            for task, of in self.tasks.items()
        }
        return {"name": self.name, "memory": self.memory.to_dict(), "tasks": tasks, "harness": self.harness}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Result:
        """Inverse of `to_dict`."""
        tasks = {
            task: tuple(CellScores(c["length"], c["depth"], Scores(*map(np.array, c["scores"]))) for c in of_task)
            for task, of_task in data["tasks"].items()
        }
        return cls(data["name"], Memory(**data["memory"]), tasks, data["harness"])

    def scores(self, task: str) -> Scores:
        """All cells of a task, one after the other."""
        return Scores.joined([cell.scores for cell in self.tasks[task]])


class Kept(Protocol):
    """Rows of earlier runs; see `minicache_trt.evaluation.kept`."""

    def get(self, contender: Contender) -> Result | None: ...

    def put(self, contender: Contender, result: Result) -> None: ...


def run_tasks(
    llm: LLM, cells: Mapping[str, Sequence[Cell]], report: Callable[[int], None]
) -> dict[str, tuple[CellScores, ...]]:
    """Scores of every cell of every task; ``report`` takes the number of tokens done.

    Examples of all tasks run together, as many as the engine takes at a time.
    """
    prefix, batch = exact_prefix(llm.engine.build), llm.engine.build.max_batch_size
    everything = [example for of_task in cells.values() for cell in of_task for example in cell.examples]
    if not everything:
        return {}
    scores = score_examples(llm, everything, prefix, batch, report)
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
    kept: Kept | None = None,
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
        Takes the contender's name, tokens done and their number.
    kept : Kept, optional
        Rows that need not be measured again; new ones are added as soon as they are there.

    Raises
    ------
    UserError
        An engine cannot be built or run.
    """
    total = sum(len(e.tokens) - 1 for of_task in cells.values() for cell in of_task for e in cell.examples)
    results = []
    for contender in contenders:
        report(contender.name, 0, total)
        result = None if kept is None else kept.get(contender)
        if result is None:
            with contender.open(threads, backend) as llm:

                def progress(done: int, name: str = contender.name) -> None:
                    report(name, done, total)

                scores = run_tasks(llm, cells, progress)
                found = harness(llm) if harness is not None else {}
                result = Result(contender.name, Memory.of(llm), scores, found)
            if kept is not None:
                kept.put(contender, result)
        report(contender.name, total, total)
        results.append(result)
    return results
