"""Names of tensors for people: every one of them, those that differ in their numbers alone written as one."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from itertools import product

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


def collapsed(names: Iterable[str]) -> list[str]:
    """``model.layers.[0-31].mlp.up_proj.weight`` for 32 names; where they form no such grid, one by one."""
    kinds: dict[tuple[str, ...], list[tuple[int, ...]]] = {}
    for name in dict.fromkeys(names):
        numbers = tuple(map(int, _NUMBER.findall(name)))
        kinds.setdefault(tuple(_NUMBER.split(name)), []).append(numbers)
    result = []
    for parts, found in kinds.items():
        axes = [sorted({numbers[axis] for numbers in found}) for axis in range(len(parts) - 1)]
        if sorted(found) == sorted(product(*axes)):
            result.append(_joined(parts, [_ranges(axis) for axis in axes]))
        else:
            result += [_joined(parts, [str(number) for number in numbers]) for numbers in found]
    return result


def listed(names: Iterable[str]) -> str:
    """`collapsed`, in one line."""
    return ", ".join(collapsed(names))


def _joined(parts: Sequence[str], numbers: Sequence[str]) -> str:
    return parts[0] + "".join(number + part for number, part in zip(numbers, parts[1:], strict=True))


def _ranges(numbers: Sequence[int]) -> str:
    """``7``, ``[0-3]`` or ``[0-3,5,9-11]``."""
    if len(numbers) == 1:
        return str(numbers[0])
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return "[" + ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs) + "]"
