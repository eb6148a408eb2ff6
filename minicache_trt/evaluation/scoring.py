"""Answers of examples, scored through an engine's own cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from minicache_trt.config import BLOCK_SIZE, BuildConfig
from minicache_trt.evaluation.examples import Example

LOGIT_BYTES = 1 << 29
"""Logits held at a time decide how many sequences run together."""

Array = NDArray[np.float64]
Progress = Callable[[int], None]
"""Takes the number of examples done."""


class Scorer(Protocol):
    """The part of `minicache_trt.LLM` that is used."""

    def score(
        self, token_ids: Sequence[list[int]], prompt_lens: Sequence[int] | None, start: int | Sequence[int]
    ) -> list[NDArray[np.float32]]: ...


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


def score_examples(
    llm: Scorer, examples: Sequence[Example], prefix: int, batch: int, vocab_size: int, progress: Progress
) -> Scores:
    """Score the answers of examples with teacher forcing.

    Parameters
    ----------
    llm : LLM
    examples : sequence of Example
    prefix : int
        Prompt of the examples that name none, `exact_prefix`.
    batch : int
        Most sequences at a time.
    vocab_size : int
    progress : callable

    Returns
    -------
    Scores
        In the order of the examples.
    """
    rows: list[tuple[float, ...]] = []
    start = 0
    while start < len(examples):
        longest = max(len(e.tokens) - e.answers[0][0] + 1 for e in examples[start : start + batch])
        some = examples[start : start + max(1, min(batch, LOGIT_BYTES // (4 * vocab_size * longest)))]
        firsts = [example.answers[0][0] - 1 for example in some]
        # The last token's logits predict past the sequence.
        inputs = [example.tokens[:-1] for example in some]
        lengths = [min(prefix if e.prompt is None else e.prompt, len(t)) for e, t in zip(some, inputs, strict=True)]
        for example, first, logits in zip(some, firsts, llm.score(inputs, lengths, start=firsts), strict=True):
            rows.append(answer_scores(example, first, logits))
        start += len(some)
        progress(start)
    return Scores(*np.array(rows, np.float64).T)


def answer_scores(example: Example, first: int, logits: NDArray[np.float32]) -> tuple[float, ...]:
    """One row of `Scores`; ``logits[j]`` predict the token at ``first + j + 1``."""
    nll = right = count = exact = 0.0
    for start, stop in example.answers:
        rows, targets = logits[start - 1 - first : stop - 1 - first], np.array(example.tokens[start:stop])
        hits = rows.argmax(-1) == targets
        nll += float(token_nll(rows, targets).sum())
        right, count, exact = right + hits.sum(), count + len(targets), exact + bool(hits.all())
    return nll, float(right), float(count), float(exact), float(len(example.answers))


def token_nll(logits: NDArray[np.float32], targets: NDArray[np.int64]) -> Array:
    """Negative log-likelihood of each target, in nats: ``[N, vocab]`` and ``[N]`` to ``[N]``."""
    peak = logits.max(-1, keepdims=True)
    total = np.log(np.exp(logits - peak).sum(-1, dtype=np.float64)) + peak[:, 0]
    result: Array = total - logits[np.arange(len(targets)), targets]
    return result
