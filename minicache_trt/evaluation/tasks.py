"""What is measured: perplexity, and tasks that cannot be done without reading the cache far back."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from minicache_trt.errors import UserError
from minicache_trt.evaluation import examples
from minicache_trt.evaluation.examples import Example
from minicache_trt.evaluation.text import TokenizedText


@dataclass(frozen=True)
class Settings:
    """Sizes of all tasks.

    Parameters
    ----------
    length : int
        Tokens of a window of text, and of an example unless ``lengths`` says otherwise.
    windows : int
        Windows of text; fewer where they would overlap.
    examples : int
        Examples of every other task, for each of ``lengths``.
    lengths : tuple of int
        Lengths of the examples; ``()`` is ``(length,)``.
    depths : tuple of float
        `passkey`: where the number is told, in [0, 1] of the text before the question.
    segment : int
        `repeat` and `copy`: random tokens to repeat.
    queries : int
        `keyvalue`: names asked for in each example.
    seed : int
        Of everything random.
    """

    length: int = 512
    windows: int = 64
    examples: int = 40
    lengths: tuple[int, ...] = ()
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    segment: int = 150
    queries: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("length", "windows", "examples", "queries"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected a positive number, got {getattr(self, name)}")
        if self.segment < 2:
            raise ValueError(f"segment: expected at least 2 tokens, got {self.segment}")
        if not self.depths or not all(0 <= depth <= 1 for depth in self.depths):
            raise ValueError(f"depths: expected numbers in [0, 1], got {', '.join(map(str, self.depths))}")
        if not all(length >= 1 for length in self.lengths):
            raise ValueError(f"lengths: expected positive numbers, got {', '.join(map(str, self.lengths))}")

    @property
    def example_lengths(self) -> tuple[int, ...]:
        return self.lengths or (self.length,)

    @property
    def longest(self) -> int:
        """Tokens an engine must be built for."""
        return max(self.length, *self.example_lengths)


@dataclass(frozen=True)
class Cell:
    """Examples of one length, and for `passkey` of one depth."""

    length: int
    depth: float | None
    examples: tuple[Example, ...]


@dataclass(frozen=True)
class Task:
    """One measurement; ``headline`` is what tables show of it: ``perplexity``, ``accuracy`` or ``exact``."""

    name: str
    headline: str
    cells: Callable[[TokenizedText, Settings, int], list[Cell]]


def _perplexity(text: TokenizedText, settings: Settings, prefix: int) -> list[Cell]:
    """Windows of running text; every token behind the ``prefix`` exact ones is scored, decoded one by one."""
    return [Cell(settings.length, None, tuple(text.windows(settings.length, settings.windows, prefix + 1)))]


Make = Callable[[examples.Source, np.random.Generator, int, Settings], Example]


def _cells(make: Make, shortest: Callable[[TokenizedText, Settings], int]) -> Callable[..., list[Cell]]:
    """A cell per length, from one way to make an example."""

    def cells(text: TokenizedText, settings: Settings, prefix: int) -> list[Cell]:
        source, found = text.source(), []
        for length in settings.example_lengths:
            _check_length(length, max(prefix + 2, shortest(text, settings)))
            rng = np.random.default_rng((settings.seed, length))
            made = tuple(make(source, rng, length, settings) for _ in range(settings.examples))
            found.append(Cell(length, None, made))
        return found

    return cells


def _repeat(source: examples.Source, rng: np.random.Generator, length: int, settings: Settings) -> Example:
    return examples.repeated(source, rng, length, settings.segment)


def _copy(source: examples.Source, rng: np.random.Generator, length: int, settings: Settings) -> Example:
    return examples.copied(source, rng, length, settings.segment)


def _key_values(source: examples.Source, rng: np.random.Generator, length: int, settings: Settings) -> Example:
    return examples.key_values(source, rng, length, settings.queries)


def _passkey(text: TokenizedText, settings: Settings, prefix: int) -> list[Cell]:
    """A cell per length and depth; together they have as many examples as other tasks have for a length."""
    source, found = text.source(), []
    each = -(-settings.examples // len(settings.depths))
    needed = len(source.encode("".join((*examples.NEEDLE, examples.QUESTION, " 12345 67890")))) + 24
    for length in settings.example_lengths:
        _check_length(length, max(prefix + 2, needed))
        for index, depth in enumerate(settings.depths):
            rng = np.random.default_rng((settings.seed, length, index))
            made = tuple(examples.passkey(source, rng, length, depth) for _ in range(each))
            found.append(Cell(length, depth, made))
    return found


def _pair_tokens(text: TokenizedText, settings: Settings) -> int:
    pair = len(text.source().encode("".join((examples.PAIR[0], "1234", examples.PAIR[1], "12345")))) + 4
    return 2 * settings.queries * pair + len(text.begin)


def _check_length(length: int, shortest: int) -> None:
    if length < shortest:
        raise UserError(
            f"examples of {length} tokens are too short: these settings need {shortest}",
            "give a larger --length, or smaller --segment and --queries",
        )


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task("perplexity", "perplexity", _perplexity),
        Task("repeat", "accuracy", _cells(_repeat, lambda text, settings: settings.segment + len(text.begin) + 2)),
        Task("copy", "accuracy", _cells(_copy, lambda text, settings: 2 * settings.segment + len(text.begin) + 1)),
        Task("passkey", "exact", _passkey),
        Task("keyvalue", "exact", _cells(_key_values, _pair_tokens)),
    )
}


def split_names(names: Sequence[str]) -> tuple[list[str], list[str]]:
    """Names of `TASKS`, and the others, which may be lm-eval-harness's."""
    return [name for name in names if name in TASKS], [name for name in names if name not in TASKS]


def unknown_task(name: str, known: Sequence[str]) -> UserError:
    """The error for a name that is nobody's task."""
    close = difflib.get_close_matches(name, [*TASKS, *known], n=1)
    return UserError(
        f"unknown task {name!r}" + (f", did you mean {close[0]!r}?" if close else ""),
        f"tasks: {', '.join(TASKS)}, and those of lm-eval-harness (--include-path for your own)",
    )


def make_cells(names: Sequence[str], text: TokenizedText, settings: Settings, prefix: int) -> dict[str, list[Cell]]:
    """Examples of tasks, the same for every method.

    Parameters
    ----------
    names : sequence of str
        Of `TASKS`.
    text : TokenizedText
    settings : Settings
    prefix : int
        See `minicache_trt.evaluation.scoring.exact_prefix`.

    Raises
    ------
    UserError
        The text or a length is too short.
    """
    return {name: TASKS[name].cells(text, settings, prefix) for name in names}
