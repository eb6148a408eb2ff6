"""Tasks of lm-eval-harness on an engine (the extra ``eval``)."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from minicache_trt.errors import UserError
from minicache_trt.evaluation.bootstrap import Resamples, interval
from minicache_trt.evaluation.tasks import unknown_task
from minicache_trt.runtime.llm import LLM


@dataclass
class HarnessTasks:
    """Tasks by name, and how much of them.

    Parameters
    ----------
    names : tuple of str
        Tasks or groups.
    include_path : Path, optional
        Folder with tasks of your own (YAML).
    limit : int, optional
        Documents of each task; default all.
    num_fewshot : int, optional
        Default: what each task says.

    Raises
    ------
    UserError
        lm-eval is not installed, a task is unknown, or its data cannot be had.
    """

    names: tuple[str, ...]
    include_path: Path | None = None
    limit: int | None = None
    num_fewshot: int | None = None

    def __post_init__(self) -> None:
        """Load every task once, so that what is missing is known before anything is measured."""
        if importlib.util.find_spec("lm_eval") is None:
            raise UserError(
                f"{', '.join(self.names)}: no task of ours, and lm-eval is not installed",
                "pip install 'minicache-trt[eval]'",
            )
        if self.include_path is not None and not self.include_path.is_dir():
            raise UserError(f"--include-path: no such directory {self.include_path}")
        quiet()
        # The folder alone first: to look through all tasks that come with lm-eval-harness takes seconds.
        if self.include_path is None or not self._load(own_only=True):
            self._load(own_only=False)

    def _load(self, own_only: bool) -> bool:
        """Find and load the tasks; False when ``own_only`` and that did not do."""
        from lm_eval.tasks import TaskManager, get_task_dict

        folder = None if self.include_path is None else str(self.include_path)
        self._manager: Any = TaskManager(include_path=folder, include_defaults=not own_only)
        known = set(self._manager.all_tasks)
        for name in self.names:
            if name not in known:
                if own_only:
                    return False
                raise unknown_task(name, sorted(known))
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                get_task_dict(list(self.names), self._manager)
        except Exception as error:  # whatever a task's own code or its data raise
            if own_only:
                return False
            cause = " ".join(str(error).split()) or type(error).__name__
            raise UserError(
                f"{', '.join(self.names)}: lm-eval-harness cannot load it: {cause[:300]}",
                "its data must be on this machine or reachable",
            ) from error
        return True

    def __call__(self, llm: LLM) -> dict[str, Any]:
        """Run the tasks on an engine.

        Returns
        -------
        dict
            By task, then by metric: ``value``, ``stderr`` (None where it has none) and ``samples``, the metric of each
            document where it is a mean over documents (otherwise None).
        """
        from lm_eval import simple_evaluate

        from minicache_trt.evaluation.harness_model import EngineLM

        quiet()
        with contextlib.redirect_stdout(io.StringIO()):
            output: Any = simple_evaluate(
                model=EngineLM(llm),
                tasks=list(self.names),
                task_manager=self._manager,
                limit=self.limit,
                num_fewshot=self.num_fewshot,
                bootstrap_iters=0,
            )
        return {task: _metrics(values, output["samples"].get(task, [])) for task, values in output["results"].items()}


def quiet() -> None:
    """Keep lm-eval-harness's log out of our output."""
    for name in ("lm_eval", "datasets"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _metrics(values: dict[str, Any], samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Metrics of one task from keys such as ``acc,none`` and ``acc_stderr,none``."""
    found = {}
    for key, value in values.items():
        name, comma, chosen = key.partition(",")
        if not comma or name.endswith("_stderr") or not isinstance(value, int | float):
            continue
        stderr = values.get(f"{name}_stderr,{chosen}")
        rows = sorted((s for s in samples if s.get("filter", chosen) == chosen), key=lambda s: int(s["doc_id"]))
        each = [row.get(name) for row in rows]
        numeric = bool(each) and all(isinstance(v, int | float) for v in each)
        # A metric that is not the mean of its documents (a perplexity, say) has no resampled interval.
        mean = numeric and bool(np.isclose(np.mean([float(v) for v in each if v is not None]), value))
        label = name if chosen == "none" else f"{name} ({chosen})"
        found[label] = {
            "value": float(value),
            "stderr": float(stderr) if isinstance(stderr, int | float) else None,
            "samples": [float(v) for v in each if v is not None] if mean else None,
        }
    return found


def with_changes(found: dict[str, Any], full: dict[str, Any]) -> dict[str, Any]:
    """Metrics with ``change`` and, where documents are known, ``change_interval`` against the first method's."""
    result: dict[str, Any] = {}
    for task, metrics in found.items():
        result[task] = {}
        for name, values in metrics.items():
            own, other = values["samples"], full[task][name]["samples"]
            line = {key: values[key] for key in ("value", "stderr")}
            line["change"] = values["value"] - full[task][name]["value"]
            line["documents"] = None if own is None else len(own)
            if own is not None and other is not None:
                difference = np.array(own) - np.array(other)
                line["change_interval"] = interval(Resamples.of(len(own)).ratio(difference, np.ones(len(own))))
            result[task][name] = line
    return result
