"""Finished rows of an evaluation on disk: a killed run goes on, and one more method costs only itself."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from minicache_trt.checkpoint import load_checkpoint
from minicache_trt.engine_directory import CHECKPOINT, read_engine, tool_versions
from minicache_trt.errors import UserError
from minicache_trt.evaluation.contenders import Contender
from minicache_trt.evaluation.evaluate import Result
from minicache_trt.evaluation.tasks import Cell

FORMAT = "minicache-trt eval rows"


class KeptResults:
    """Results by a digest of everything they depend on: examples, weights, plan, limits, versions of the tools.

    Parameters
    ----------
    path : Path
        JSON; complete at any time.
    cells : mapping
        Examples of all tasks.
    other : mapping
        JSON data that results depend on too: backend, tasks of lm-eval-harness.

    Raises
    ------
    UserError
        The file cannot be read, or is something else.
    """

    def __init__(self, path: Path, cells: Mapping[str, Sequence[Cell]], other: Mapping[str, Any]) -> None:
        self._path = path
        self._shared = {"other": dict(other), "tools": tool_versions(), "cells": _digest(_plain(cells))}
        self._rows: dict[str, Any] = {}
        if path.exists():
            self._rows = _read(path)
        elif not path.absolute().parent.is_dir():
            raise UserError(f"--results: there is no folder {path.absolute().parent}", "make it, or give another one")

    def get(self, contender: Contender) -> Result | None:
        """The row of an earlier run, None where it has to be measured."""
        row = self._rows.get(self._key(contender))
        return None if row is None else Result.from_dict({**row, "name": contender.name})

    def put(self, contender: Contender, result: Result) -> None:
        """Keep a row.

        Raises
        ------
        UserError
            The file cannot be written.
        """
        self._rows[self._key(contender)] = result.to_dict()
        temporary = self._path.with_name(f".{self._path.name}.tmp")
        try:
            temporary.write_text(json.dumps({"format": FORMAT, "rows": self._rows}) + "\n", encoding="utf-8")
            os.replace(temporary, self._path)
        except OSError as error:
            raise UserError(f"--results: cannot write {self._path}: {error.strerror or error}") from error

    def _key(self, contender: Contender) -> str:
        own = contender.build is None
        build = read_engine(contender.source).build if contender.build is None else contender.build
        checkpoint = contender.source / CHECKPOINT if own else contender.source
        constants = [(name, array.shape, str(array.dtype), hashlib.sha256(array.tobytes()).hexdigest())
                     for name, array in sorted(contender.plan.matrices.items())]  # fmt: skip
        parts = {
            "checkpoint": load_checkpoint(str(checkpoint)).checksum(),
            "engine": str(contender.source.resolve()) if own else None,
            "plan": contender.plan.to_dict(),
            "constants": constants,
            "build": asdict(build),
        }
        return _digest({**self._shared, **parts})


def _plain(cells: Mapping[str, Sequence[Cell]]) -> dict[str, Any]:
    return {task: [asdict(cell) for cell in of_task] for task, of_task in cells.items()}


def _digest(data: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True, default=str).encode()).hexdigest()


def _read(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--results: cannot read {path}: {error.strerror or error}") from error
    except ValueError:
        data = None
    if not isinstance(data, dict) or data.get("format") != FORMAT or not isinstance(data.get("rows"), dict):
        raise UserError(
            f"--results: {path} is there and holds no rows of eval, so it is left alone", "give another file"
        )
    rows: dict[str, Any] = data["rows"]
    return rows
