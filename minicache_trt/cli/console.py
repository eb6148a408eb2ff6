"""What every verb prints with: tables on stdout, progress and errors on stderr, JSON for machines."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Column, Table
from rich.text import Text

from minicache_trt.errors import UserError

if TYPE_CHECKING:
    from minicache_trt.engine_writer import Report

# Paths and prompts are printed as they are: [brackets] and :colons: in them mean nothing.
stdout = Console(highlight=False, markup=False, emoji=False)
stderr = Console(stderr=True, highlight=False, markup=False, emoji=False)


def print_error(error: UserError) -> None:
    """Cause and remedy, a line each."""
    for label, style, text in (("error:", "bold red", error.cause), ("hint:", "bold", error.remedy)):
        if text:
            line = " ".join(text.splitlines())
            stderr.print(Text.assemble((label, style), f" {line}"), soft_wrap=True)


def quiet_transformers() -> None:
    """Keep transformers' progress bars and advice out of our output."""
    logging: Any = importlib.import_module("transformers.utils.logging")
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def print_json(data: object) -> None:
    print(json.dumps(data, indent=1))


def table(title: str, *columns: str, left: int = 1) -> Table:
    """A table whose first ``left`` columns are text and the others numbers."""
    result = Table(title=title, title_justify="left", header_style="bold")
    for index, column in enumerate(columns):
        result.add_column(column, justify="left" if index < left else "right", overflow="fold")
    return result


@contextmanager
def progress_bars(enabled: bool = True) -> Iterator[Report]:
    """A progress bar per stage, where stderr is a terminal; the yielded callable takes stage, done and total."""
    stage = TextColumn("{task.description:<11}", table_column=Column(max_width=44, no_wrap=True))
    columns = (stage, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=stderr, disable=not (enabled and stderr.is_terminal)) as progress:
        tasks: dict[str, TaskID] = {}

        def report(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = progress.add_task(stage, total=total)
            progress.update(tasks[stage], completed=done, total=total)

        yield report
