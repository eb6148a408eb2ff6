"""Groups of tensors that are computed from one weight each, written side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from numpy.typing import NDArray

from minicache_trt.checkpoint.streaming import Progress
from minicache_trt.checkpoint.weights import WeightView
from minicache_trt.errors import UserError
from minicache_trt.quantization.partial_file import PartialFile
from minicache_trt.quantization.workers import run_jobs


class NotFinite(ValueError):
    """A weight holds infinities or NaN."""


@dataclass(frozen=True)
class Group:
    """Tensors ``names`` of a file; ``parts`` computes pieces of them from ``source``, or raises `NotFinite`."""

    names: tuple[str, ...]
    source: WeightView
    parts: Callable[[], Iterable[tuple[str, NDArray[Any]]]]


def write_groups(file: PartialFile, groups: Sequence[Group], threads: int, progress: Progress) -> None:
    """Write the groups that ``file`` lacks.

    Raises
    ------
    UserError
        Weights hold infinities or NaN: each is named.
    """
    pending = [group for group in groups if not file.finished.issuperset(group.names)]
    damaged: list[WeightView] = []
    count = len(groups) - len(pending)

    def job(group: Group) -> None:
        try:
            file.write(group.names, group.parts())
        except NotFinite:
            damaged.append(group.source)

    def done() -> None:
        nonlocal count
        count += 1
        progress(count, len(groups))

    progress(count, len(groups))
    run_jobs([partial(job, group) for group in pending], threads, done)
    refuse_damaged(damaged)


def refuse_damaged(views: Sequence[WeightView]) -> None:
    """Name weights that hold infinities or NaN.

    Raises
    ------
    UserError
        There are any.
    """
    if views:
        names = ", ".join(sorted(f"{view.name} ({view.file.name})" for view in views))
        raise UserError(
            f"{views[0].file.parent}: weights hold infinities or NaN: {names}", "download the checkpoint again"
        )
