"""Answers of examples, scored through an engine's own cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from minicache_trt.config import BLOCK_SIZE, BuildConfig
from minicache_trt.evaluation.examples import Example

Array = NDArray[np.float64]
Progress = Callable[[int], None]
"""Takes the number of tokens done."""


class Scorer(Protocol):
    """The part of `minicache_trt.LLM` that is used."""

    def likelihoods(
        self, token_ids: Sequence[list[int]], prompt_lens: Sequence[int] | None, start: int | Sequence[int],
        progress: Callable[[int], None] | None,
    ) -> list[tuple[Array, NDArray[np.bool_]]]: ...  # fmt: skip


@dataclass(frozen=True)
class Scores:
    """Per example, ``[n]`` each.

    ``nll``: of all its answer tokens, in nats, summed. ``right``: answer tokens that were the most likely ones.
    ``count``: answer tokens. ``exact``: answers all of whose tokens were right, which greedy decoding would have
    produced. ``answers``: answers.
    """

    nll: Array
    right: Array
    count: Array
    exact: Array
    answers: Array

    @classmethod
    def joined(cls, parts: Sequence[Scores]) -> Scores:
        columns = [part.columns() for part in parts]
        return cls(*(np.concatenate(column) for column in zip(*columns, strict=True)))

    def part(self, start: int, stop: int) -> Scores:
        """Examples ``start`` to ``stop``."""
        return Scores(*(column[start:stop] for column in self.columns()))

    def columns(self) -> tuple[Array, ...]:
        """The fields, in their order."""
        return self.nll, self.right, self.count, self.exact, self.answers


def exact_prefix(build: BuildConfig) -> int:
    """Tokens of a sequence that are in no case read compressed by the tokens among them: the window and a block."""
    return build.window + BLOCK_SIZE


def score_examples(llm: Scorer, examples: Sequence[Example], prefix: int, batch: int, progress: Progress) -> Scores:
    """Score the answers of examples with teacher forcing.

    Parameters
    ----------
    llm : LLM
    examples : sequence of Example
    prefix : int
        Prompt of the examples that name none, `exact_prefix`.
    batch : int
        Sequences at a time.
    progress : callable

    Returns
    -------
    Scores
        In the order of the examples.
    """
    rows: list[tuple[float, ...]] = []
    before = 0
    for start in range(0, len(examples), batch):
        some = examples[start : start + batch]
        firsts = [example.answers[0][0] - 1 for example in some]
        tokens = [example.tokens for example in some]
        lengths = [min(prefix if e.prompt is None else e.prompt, len(e.tokens) - 1) for e in some]
        likelihoods = llm.likelihoods(tokens, lengths, firsts, lambda done: progress(before + done))  # noqa: B023
        rows += [answer_scores(e, first, *found) for e, first, found in zip(some, firsts, likelihoods, strict=True)]
        before += sum(len(example.tokens) - 1 for example in some)
    return Scores(*np.array(rows, np.float64).T)


def answer_scores(example: Example, first: int, token_nll: Array, likeliest: NDArray[np.bool_]) -> tuple[float, ...]:
    """One row of `Scores`; entry j of what `LLM.likelihoods` found is of the token at ``first + j + 1``."""
    nll = right = count = exact = 0.0
    for start, stop in example.answers:
        own = slice(start - 1 - first, stop - 1 - first)
        hits = likeliest[own]
        nll += float(token_nll[own].sum())
        right, count, exact = right + hits.sum(), count + stop - start, exact + bool(hits.all())
    return nll, float(right), float(count), float(exact), float(len(example.answers))
