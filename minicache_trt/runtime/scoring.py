"""A sequence whose tokens are given."""

from __future__ import annotations

from collections.abc import Callable, Sequence

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


class Scoring:
    """Logits of given tokens: the prompt is prefilled, the continuation decoded token by token.

    Everything is computed; no cached prefix is used.

    Parameters
    ----------
    token_ids : list of int
        Prompt and continuation.
    prompt_len : int
        Tokens of the prompt; decides the demotion schedule.
    start : int
        First position whose logits are kept.
    vocab_size : int
        Length of a row of logits.
    observe : callable, optional
        Called with the number within the sequence, and the id in the compressed tier, of each block compressed.
    """

    def __init__(
        self,
        token_ids: list[int],
        prompt_len: int,
        start: int,
        vocab_size: int,
        observe: Callable[[int, int], None] | None = None,
    ) -> None:
        options = RequestOptions(reuse=False)
        self.sequence = TokenSequence(list(token_ids[:prompt_len]), prompt_len, len(token_ids), start, options)
        self.logits: NDArray[np.float32] = np.zeros((max(0, len(token_ids) - start), vocab_size), np.float32)
        self.finished = False
        self.error: str | None = None
        self._token_ids = token_ids
        self._start = start
        self._observe = observe

    @property
    def event(self) -> TokenEvent | None:
        return None

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
        self.logits[position - self._start : position - self._start + len(logits)] = logits

    def compressed(self, demotion: Demotion) -> None:
        """Report a block of this sequence that has been compressed."""
        if self._observe is not None:
            self._observe(demotion.block_index, demotion.target)

    def end(self, reason: str, message: str | None = None) -> None:
        """End before all logits are there."""
        self.finished = True
        self.error = message or reason

    def result(self) -> NDArray[np.float32]:
        """The logits, once all of them are there.

        Raises
        ------
        RuntimeError
            When scoring ended early.
        """
        if self.error is not None:
            raise RuntimeError(f"scoring ended early: {self.error}")
        return self.logits


def scoring_jobs(
    token_ids: Sequence[list[int]],
    prompt_lens: Sequence[int] | None,
    start: int | Sequence[int],
    observe: Callable[[int, int, int], None] | None,
    model: ModelConfig,
    build: BuildConfig,
) -> list[Scoring]:
    """Jobs for `LLM.score`; see there.

    Raises
    ------
    UserError
        When tokens or lengths cannot be used.
    """
    count = len(token_ids)
    lengths = [len(tokens) for tokens in token_ids] if prompt_lens is None else list(prompt_lens)
    starts = [start] * count if isinstance(start, int) else list(start)
    for name, values in (("prompt_lens", lengths), ("start", starts)):
        if len(values) != count:
            raise UserError(f"{name}: expected {count} numbers, one per sequence, got {len(values)}")
    for index, (tokens, length, first) in enumerate(zip(token_ids, lengths, starts, strict=True)):
        check_tokens(tokens, f"token_ids[{index}]", model.vocab_size, build.max_seq_len)
        if not 1 <= length <= len(tokens):
            raise UserError(f"prompt_lens[{index}]: expected 1 to {len(tokens)}, got {length}")
        if first < 0:
            raise UserError(f"start: expected positions of at least 0, got {first}")

    def observer(index: int) -> Callable[[int, int], None] | None:
        return None if observe is None else lambda block, target: observe(index, block, target)

    return [
        Scoring(tokens, length, first, model.vocab_size, observer(index))
        for index, (tokens, length, first) in enumerate(zip(token_ids, lengths, starts, strict=True))
    ]
