"""Registers, spills and shared memory of every kernel of a build, as ``-Xptxas -v`` told them.

Usage: ptxas_report.py BUILD_FOLDER [--each] [--hot REGEX]

Exit code 1 when a hot kernel spills registers to memory, 2 when the folder holds no report. Standard library only: it
runs where the package is not installed.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

HOT = ""
"""Kernels that must not spill: part of their name, in any case. All of them."""

_ENTRY = re.compile(r"Compiling entry function '(\S+)' for '(\S+)'")
_PROPERTIES = re.compile(r"Function properties for (\S+)")
_SPILLS = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers")
_SHARED = re.compile(r"(\d+) bytes smem")


@dataclass
class Usage:
    """One kernel on one architecture: registers per thread, everything else in bytes; ``shared`` is the static part."""

    symbol: str
    target: str
    registers: int = 0
    stack: int = 0
    spill_stores: int = 0
    spill_loads: int = 0
    shared: int = 0

    @property
    def spills(self) -> int:
        return self.spill_stores + self.spill_loads


def parse(text: str) -> list[Usage]:
    """Kernels in ptxas' output, in its order; device functions that are not kernels are left out."""
    result: list[Usage] = []
    current: Usage | None = None
    function = ""
    for line in text.splitlines():
        if match := _ENTRY.search(line):
            current = Usage(match[1], match[2])
            result.append(current)
        elif match := _PROPERTIES.search(line):
            function = match[1]
        elif current is None:
            continue
        elif (match := _SPILLS.search(line)) and function == current.symbol:
            current.stack, current.spill_stores, current.spill_loads = map(int, match.groups())
        elif match := _USED.search(line):
            current.registers = int(match[1])
            if shared := _SHARED.search(line):
                current.shared = int(shared[1])
    return result


def demangled(symbols: Sequence[str]) -> list[str]:
    """C++ names, where c++filt is at hand; this project's own wrapping and namespace are taken off."""
    names = list(symbols)
    if shutil.which("c++filt"):
        text = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True).stdout
        names = text.splitlines()
    return [_short(name) for name in names]


def _short(name: str) -> str:
    """``void minicache::enter<minicache::Kernel<int>, Arguments>(Arguments)`` to ``Kernel<int>``."""
    name = name.replace("minicache::", "").replace("(anonymous namespace)::", "")
    start = name.find("enter<")
    if start < 0:
        return name
    depth, first = 0, start + len("enter<")
    for place in range(first, len(name)):
        depth += (name[place] == "<") - (name[place] == ">")
        if depth < 0 or (depth == 0 and name[place] == ","):
            return name[first:place].strip()
    return name


def table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Aligned columns, the first to the left."""
    cells = [list(columns), *([str(cell) for cell in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for row in cells:
        rest = (cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))
        lines.append("  ".join([row[0].ljust(widths[0]), *rest]).rstrip())
    return "\n".join(lines)


def summary(usages: Sequence[tuple[str, Usage]], each: bool) -> str:
    """One row per kernel template and architecture with its worst instantiation, or one per instantiation."""
    groups: dict[tuple[str, str], list[Usage]] = {}
    for name, usage in usages:
        groups.setdefault((name if each else name.partition("<")[0], usage.target), []).append(usage)
    rows = [
        (
            name,
            target,
            len(group),
            max(usage.registers for usage in group),
            max(usage.stack for usage in group),
            max(usage.spills for usage in group),
            max(usage.shared for usage in group),
        )
        for (name, target), group in sorted(groups.items())
    ]
    return table(("kernel", "target", "variants", "registers", "stack", "spilled", "static shared"), rows)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Registers, spills and shared memory of every kernel of a build.")
    parser.add_argument("folder", type=Path, help="build folder")
    parser.add_argument("--each", action="store_true", help="a row for each instantiation")
    parser.add_argument("--hot", default=HOT, help="regular expression of kernels that must not spill")
    options = parser.parse_args(arguments)
    files = sorted(options.folder.rglob("*.ptxas"))
    if not files:
        print(f"error: {options.folder} holds no ptxas report; build it with build_plugins.sh", file=sys.stderr)
        return 2
    usages = [usage for file in files for usage in parse(file.read_text(encoding="utf-8"))]
    named = list(zip(demangled([usage.symbol for usage in usages]), usages, strict=True))
    if named:
        print(summary(named, options.each))
    spilled = [(name, usage) for name, usage in named if usage.spills and re.search(options.hot, name, re.IGNORECASE)]
    for name, usage in spilled:
        print(f"error: {name} spills {usage.spills} bytes on {usage.target}", file=sys.stderr)
    return 1 if spilled else 0


if __name__ == "__main__":
    sys.exit(main())
