"""Large pages for weights: a step reads every weight once, and translating addresses costs as much as some of it."""

from __future__ import annotations

import contextlib
import ctypes
import sys
from collections.abc import Iterator
from pathlib import Path

PAGE = 2 << 20
"""Bytes of a large page on x86-64 and, with 4 KiB base pages, on ARM."""
MAX_COLLAPSED_BYTES = 4 << 30
"""Collapsing copies memory at about a second per GiB; beyond this the kernel is left to do it in the background."""
_MADV_HUGEPAGE, _MADV_COLLAPSE = 14, 25  # linux/mman.h

Region = tuple[int, int]
"""First address and the one behind the last."""


class HugePages:
    """Asks the kernel to back with large pages what this process allocates from now on.

    Only Linux knows how; elsewhere, and where the kernel refuses, nothing happens. Memory's contents do not change.
    """

    def __init__(self) -> None:
        self._known = list(_anonymous_regions())

    def collapse_new(self) -> int:
        """Ask for all private memory allocated since the last call (or the beginning); returns the bytes asked for."""
        regions = list(_anonymous_regions())
        new = [part for region in regions for part in _without(region, self._known)]
        self._known = regions
        total = sum(end - start for start, end in new)
        if not new:
            return 0
        libc = ctypes.CDLL(None)
        for start, end in new:
            address, length = ctypes.c_void_p(start), ctypes.c_size_t(end - start)
            libc.madvise(address, length, _MADV_HUGEPAGE)
            if total <= MAX_COLLAPSED_BYTES:
                libc.madvise(address, length, _MADV_COLLAPSE)
        return total


def _without(region: Region, others: list[Region]) -> Iterator[Region]:
    """Parts of a region, in whole large pages, that none of ``others`` (ascending) covers."""
    start, end = region
    for first, last in [*others, (end, end)]:
        if last <= start and first < end:
            continue
        if start < min(first, end):
            yield start, min(first, end)
        start = max(start, last)
        if start >= end:
            return


def _anonymous_regions() -> Iterator[Region]:
    """Private, writable mappings without a file, reduced to whole large pages, ascending."""
    if not sys.platform.startswith("linux"):
        return
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/maps").read_text().splitlines():
            span, access, _, _, inode, *name = line.split(maxsplit=5)
            if access[:2] != "rw" or access[3] != "p" or inode != "0" or (name and name[0].startswith("[stack")):
                continue
            start, end = (int(part, 16) for part in span.split("-"))
            start, end = -(-start // PAGE) * PAGE, end // PAGE * PAGE
            if start < end:
                yield start, end
