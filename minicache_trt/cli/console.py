"""What every verb prints with: tables on stdout, progress and errors on stderr, JSON for machines."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from minicache_trt.build import Report
from minicache_trt.errors import UserError

stdout = Console(highlight=False)
stderr = Console(stderr=True, highlight=False)


def print_error(error: UserError) -> None:
    """Cause and remedy, a line each."""
    stderr.print(f"[bold red]error:[/] {escape(error.cause)}", soft_wrap=True)
    if error.remedy:
        stderr.print(f"[bold]hint:[/] {escape(error.remedy)}", soft_wrap=True)


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
    """A progress bar per stage on stderr; the yielded callable takes stage, done and total."""
    columns = (TextColumn("{task.description:<11}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=stderr, disable=not enabled) as progress:
        tasks: dict[str, TaskID] = {}

        def report(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = progress.add_task(stage, total=total)
            progress.update(tasks[stage], completed=done, total=total)

        yield report
