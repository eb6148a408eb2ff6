"""Sequences whose tokens are given: their logits, or how likely each token was."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Generic, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from minicache_trt.config import BuildConfig, ModelConfig
from minicache_trt.errors import UserError
from minicache_trt.runtime.demotion import Demotion
from minicache_trt.runtime.generation import TokenEvent
from minicache_trt.runtime.prompts import check_tokens
from minicache_trt.runtime.request import RequestOptions
from minicache_trt.runtime.request import Sequence as TokenSequence
from minicache_trt.runtime.sampler import Logits
from minicache_trt.runtime.scheduler import Work
from minicache_trt.runtime.step_logits import StepLogits

Found = TypeVar("Found", covariant=True)


class Rows(Protocol[Found]):
    """What becomes of the logits of a sequence."""

    def keep(self, first: int, logits: NDArray[np.float32]) -> None:
        """Rows ``[n, vocab]``, numbers ``first`` and on of those wanted; only valid during the call."""

    def result(self) -> Found:
        """What there is, once all rows have been kept."""


class LogitRows:
    """All of them, ``[count, vocab_size]`` float32."""

    def __init__(self, count: int, vocab_size: int) -> None:
        self._logits: NDArray[np.float32] = np.zeros((count, vocab_size), np.float32)

    def keep(self, first: int, logits: NDArray[np.float32]) -> None:
        self._logits[first : first + len(logits)] = logits

    def result(self) -> NDArray[np.float32]:
        return self._logits


class LikelihoodRows:
    """Of each row only what it says about the token that follows; see `LLM.likelihoods`."""

    def __init__(self, following: Sequence[int]) -> None:
        self._following = np.array(following, np.int64)
        self._nll = np.zeros(len(following))
        self._likeliest = np.zeros(len(following), np.bool_)

    def keep(self, first: int, logits: NDArray[np.float32]) -> None:
        own = slice(first, first + len(logits))
        self._nll[own] = token_nll(logits, self._following[own])
        self._likeliest[own] = logits.argmax(-1) == self._following[own]

    def result(self) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        return self._nll, self._likeliest


def token_nll(logits: NDArray[np.float32], targets: NDArray[np.int64]) -> NDArray[np.float64]:
    """Negative log-likelihood of each target, in nats: ``[N, vocab]`` and ``[N]`` to ``[N]``."""
    peak = logits.max(-1, keepdims=True)
    total = np.log(np.exp(logits - peak).sum(-1, dtype=np.float64)) + peak[:, 0]
    result: NDArray[np.float64] = total - logits[np.arange(len(targets)), targets]
    return result


class Scoring(Generic[Found]):
    """Given tokens through the model: the prompt is prefilled, then the continuation is computed.

    Everything is computed; no cached prefix is used.

    Parameters
    ----------
    token_ids : list of int
        Prompt and continuation.
    prompt_len : int
        Tokens of the prompt; decides the demotion schedule.
    start : int
        First position whose logits are wanted.
    rows : Rows
        Takes them.
    at_once : bool
        Compute as much of the continuation in one step as reads the same history, in place of one token.
    observe : callable, optional
        Called with the number within the sequence, and the id in the compressed tier, of each block compressed.
    """

    def __init__(
        self,
        token_ids: list[int],
        prompt_len: int,
        start: int,
        rows: Rows[Found],
        at_once: bool = False,
        observe: Callable[[int, int], None] | None = None,
    ) -> None:
        options = RequestOptions(reuse=False)
        known = list(token_ids if at_once else token_ids[:prompt_len])
        self.sequence = TokenSequence(known, prompt_len, len(token_ids), start, options)
        self.finished = False
        self.error: str | None = None
        self._token_ids = token_ids
        self._start, self._rows = start, rows
        self._observe = observe

    @property
    def event(self) -> TokenEvent | None:
        return None

    @property
    def num_computed(self) -> int:
        """Tokens whose turn has come; falls when the sequence is preempted."""
        return len(self._token_ids) if self.finished else self.sequence.num_computed

    def advance(self, item: Work, logits: StepLogits, last: int) -> int | None:
        """Keep the item's logits and feed the next given token."""
        if item.num_logits:
            self.keep(item.end - item.num_logits, logits.last_rows(last, item.num_logits))
        self.finished = item.end == len(self._token_ids)
        if self.finished or item.end < self.sequence.num_tokens:
            return None
        return self._token_ids[item.end]

    def keep(self, position: int, logits: Logits) -> None:
        """Rows ``[n, vocab]`` of positions from ``position`` on; only valid during the call."""
        self._rows.keep(position - self._start, logits)

    def compressed(self, demotion: Demotion) -> None:
        """Report a block of this sequence that has been compressed."""
        if self._observe is not None:
            self._observe(demotion.block_index, demotion.target)

    def end(self, reason: str, message: str | None = None) -> None:
        """End before all logits are there."""
        self.finished = True
        self.error = message or reason

    def result(self) -> Found:
        """What became of the logits, once all of them have been there.

        Raises
        ------
        RuntimeError
            When scoring ended early.
        """
        if self.error is not None:
            raise RuntimeError(f"scoring ended early: {self.error}")
        return self._rows.result()


def logit_jobs(
    token_ids: Sequence[list[int]],
    prompt_lens: Sequence[int] | None,
    start: int | Sequence[int],
    observe: Callable[[int, int, int], None] | None,
    model: ModelConfig,
    build: BuildConfig,
) -> list[Scoring[NDArray[np.float32]]]:
    """Jobs for `LLM.score`; see there.

    Raises
    ------
    UserError
        When tokens or lengths cannot be used.
    """

    def observer(index: int) -> Callable[[int, int], None] | None:
        return None if observe is None else lambda block, target: observe(index, block, target)

    lengths, starts = _checked(token_ids, prompt_lens, start, model, build, 0)
    return [
        Scoring(tokens, length, first, LogitRows(max(0, len(tokens) - first), model.vocab_size), False, observer(index))
        for index, (tokens, length, first) in enumerate(zip(token_ids, lengths, starts, strict=True))
    ]


def likelihood_jobs(
    token_ids: Sequence[list[int]],
    prompt_lens: Sequence[int] | None,
    start: int | Sequence[int],
    model: ModelConfig,
    build: BuildConfig,
) -> list[Scoring[tuple[NDArray[np.float64], NDArray[np.bool_]]]]:
    """Jobs for `LLM.likelihoods`; see there. The last token of each sequence is only predicted, never computed.

    Raises
    ------
    UserError
        When tokens or lengths cannot be used.
    """
    lengths, starts = _checked(token_ids, prompt_lens, start, model, build, 1)
    return [
        Scoring(tokens[:-1], length, first, LikelihoodRows(tokens[first + 1 :]), at_once=True)
        for tokens, length, first in zip(token_ids, lengths, starts, strict=True)
    ]


def _checked(
    token_ids: Sequence[list[int]], prompt_lens: Sequence[int] | None, start: int | Sequence[int], model: ModelConfig,
    build: BuildConfig, predicted: int,
) -> tuple[list[int], list[int]]:  # fmt: skip
    """Prompt lengths and starts of sequences of which all but ``predicted`` tokens are computed."""
    count = len(token_ids)
    lengths = [len(tokens) - predicted for tokens in token_ids] if prompt_lens is None else list(prompt_lens)
    starts = [start] * count if isinstance(start, int) else list(start)
    for name, values in (("prompt_lens", lengths), ("start", starts)):
        if len(values) != count:
            raise UserError(f"{name}: expected {count} numbers, one per sequence, got {len(values)}")
    for index, (tokens, length, first) in enumerate(zip(token_ids, lengths, starts, strict=True)):
        check_tokens(tokens, f"token_ids[{index}]", model.vocab_size, build.max_seq_len + predicted)
        if not 1 <= length <= len(tokens) - predicted:
            raise UserError(f"prompt_lens[{index}]: expected 1 to {len(tokens) - predicted}, got {length}")
        if first < 0:
            raise UserError(f"start: expected positions of at least 0, got {first}")
    return lengths, starts
