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


def use_huge_pages() -> int:
    """Ask the kernel to back this process's large private allocations with large pages, and return the bytes asked for.

    Only Linux knows how; elsewhere, and where the kernel refuses, nothing happens and 0 is returned or the request
    ignored. Memory's contents do not change.
    """
    if not sys.platform.startswith("linux"):
        return 0
    regions = list(_anonymous_regions())
    total = sum(end - start for start, end in regions)
    libc = ctypes.CDLL(None)
    for start, end in regions:
        address, length = ctypes.c_void_p(start), ctypes.c_size_t(end - start)
        libc.madvise(address, length, _MADV_HUGEPAGE)
        if total <= MAX_COLLAPSED_BYTES:
            libc.madvise(address, length, _MADV_COLLAPSE)
    return total


def _anonymous_regions() -> Iterator[tuple[int, int]]:
    """Private, writable mappings without a file, reduced to whole large pages."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/maps").read_text().splitlines():
            span, access, _, _, inode, *name = line.split(maxsplit=5)
            if access[:2] != "rw" or access[3] != "p" or inode != "0" or (name and name[0].startswith("[stack")):
                continue
            start, end = (int(part, 16) for part in span.split("-"))
            start, end = -(-start // PAGE) * PAGE, end // PAGE * PAGE
            if start < end:
                yield start, end
