"""A sequence that generates text."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from minicache_trt.runtime.demotion import Demotion
from minicache_trt.runtime.detokenizer import Detokenizer, TokenDecoder
from minicache_trt.runtime.guided_decoding import Constraint
from minicache_trt.runtime.observer import RequestObserver
from minicache_trt.runtime.penalties import changes_logits
from minicache_trt.runtime.request import (
    DEFAULT_OPTIONS,
    CompletionOutput,
    Logprob,
    RequestOptions,
    RequestOutput,
    SamplingParams,
    Sequence,
)
from minicache_trt.runtime.sampler import Logits, sample, top_logprobs
from minicache_trt.runtime.scheduler import Work
from minicache_trt.runtime.step_logits import StepLogits


class TokenEvent(NamedTuple):
    """A request advanced.

    Parameters
    ----------
    token_id : int, optional
        The sampled token; None when the request ended without one: by an error, a deadline or its caller.
    text : str
        Text that became certain; empty while a character or a possible stop string is incomplete.
    finish_reason : str, optional
        Set on the last event of a request.
    """

    request_id: str
    token_id: int | None
    text: str
    finish_reason: str | None


class Generation:
    """One request from prompt to `RequestOutput`.

    Parameters
    ----------
    request_id : str
        Name in outputs and events.
    prompt : str, optional
        Text of the prompt when it was given as text.
    token_ids : list of int
        The prompt, at most ``max_seq_len`` tokens.
    params : SamplingParams
        How to sample and when to stop.
    max_seq_len : int
        Prompt and output together.
    eos_token_ids : tuple of int
        End the output unless ``params.ignore_eos``.
    decoder : TokenDecoder, optional
        Without one the text stays empty.
    options : RequestOptions
        Its place among others.
    constraint : Constraint, optional
        At its beginning; made for ``params.guided_decoding``.
    observer : RequestObserver, optional
    """

    def __init__(
        self,
        request_id: str,
        prompt: str | None,
        token_ids: list[int],
        params: SamplingParams,
        max_seq_len: int,
        eos_token_ids: tuple[int, ...],
        decoder: TokenDecoder | None,
        options: RequestOptions = DEFAULT_OPTIONS,
        constraint: Constraint | None = None,
        observer: RequestObserver | None = None,
    ) -> None:
        max_len = min(len(token_ids) + params.max_tokens, max_seq_len)
        logits_start = None if params.prompt_logprobs is None else 0
        self.sequence = Sequence(list(token_ids), len(token_ids), max_len, logits_start, options)
        self.request_id = request_id
        self.event: TokenEvent | None = None
        self.finish_reason: str | None = "length" if max_len == len(token_ids) else None
        self._prompt = prompt
        self._prompt_token_ids = list(token_ids)
        self._params = params
        self._eos_token_ids = frozenset(() if params.ignore_eos else eos_token_ids)
        self._stop_token_ids = frozenset(params.stop_token_ids or ())
        self._generator = np.random.default_rng(params.seed)
        self._detokenizer = Detokenizer(decoder, token_ids, params.stop_strings) if decoder else None
        self._logprobs: list[dict[int, Logprob]] = []
        self._cumulative_logprobs = [0.0]
        self._prompt_logprobs: list[dict[int, Logprob] | None] = [None]
        self._constraint = constraint
        self._greedy = params.temperature == 0 and constraint is None and not changes_logits(params)
        self._observer = observer
        self._started = False
        self._stop_reason: int | str | None = None

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None

    def advance(self, item: Work, logits: StepLogits, last: int) -> int | None:
        """Sample when the item reached the last known token."""
        self.event = None
        if self._observer is not None and not self._started:
            self._observer.started(self.sequence)
        self._started = True
        if self._params.prompt_logprobs is not None:
            self._record_prompt_logprobs(item, logits.last_rows(last, item.num_logits))
        if item.end < self.sequence.num_tokens:
            return None
        token: int | None
        try:
            token = self._choose(logits, last - 1)
            self._record_logprobs(logits.values[last - 1], token)
            self._check_stop(token)
        except ValueError as error:  # logits that are not finite, or a grammar that grew too complex
            token = None
            self.finish_reason, self._stop_reason = "error", str(error)
        self._tell(token)
        return token

    def compressed(self, demotion: Demotion) -> None:
        """Nothing to do when a block of this sequence has been compressed."""

    def end(self, reason: str, message: str | None = None) -> None:
        """End the request before its time, with what it has."""
        self.finish_reason, self._stop_reason = reason, message
        self._tell(None)

    def output(self) -> RequestOutput:
        """The request as it stands."""
        text = self._detokenizer.text if self._detokenizer else ""
        num_tokens = len(self.sequence.output_token_ids)
        return self.snapshot(num_tokens, text, self.finished, num_tokens, len(text))

    def snapshot(self, num_tokens: int, text: str, finished: bool, num_read: int, text_read: int) -> RequestOutput:
        """The request as it was when it had ``num_tokens`` tokens and ``text``; other threads may call this.

        ``num_read`` tokens and ``text_read`` characters of these are not new.
        """
        tokens, prompt_len = self.sequence.token_ids, self.sequence.prompt_len
        chosen = tokens[prompt_len : prompt_len + num_tokens]
        logprobs = None if self._params.logprobs is None else self._logprobs[:num_tokens]
        completion = CompletionOutput(
            index=0,
            text=text,
            token_ids=chosen,
            cumulative_logprob=None if logprobs is None else self._cumulative_logprobs[num_tokens],
            logprobs=logprobs,
            finish_reason=self.finish_reason if finished else None,
            stop_reason=self._stop_reason if finished else None,
            text_diff=text[text_read:],
            token_ids_diff=chosen[num_read:],
        )
        cached = self.sequence.num_cached_tokens or 0
        prompt_logprobs = None if self._params.prompt_logprobs is None else self._prompt_logprobs
        return RequestOutput(
            self.request_id, self._prompt, self._prompt_token_ids, [completion], finished, cached, prompt_logprobs
        )

    def _choose(self, logits: StepLogits, row: int) -> int:
        if self._greedy and self.sequence.num_tokens >= self.sequence.prompt_len + self._params.min_tokens:
            token = logits.greedy[row]
            if token is not None:
                return token
        return self._sample(logits.values[row])

    def _sample(self, logits: Logits) -> int:
        sequence, constraint = self.sequence, self._constraint
        allowed = constraint.allowed() if constraint else None
        if sequence.num_tokens - sequence.prompt_len < self._params.min_tokens:
            allowed = self._without_ends(np.ones(len(logits), np.bool_) if allowed is None else allowed)
        token = sample(logits, self._params, sequence.token_ids, self._generator, sequence.prompt_len, allowed)
        if constraint:
            constraint.accept(token)
        return token

    def _without_ends(self, allowed: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """The tokens that do not end the output; all of them when there is no other."""
        others = allowed.copy()
        others[list(self._eos_token_ids | self._stop_token_ids)] = False
        return others if others.any() else allowed

    def _tell(self, token: int | None) -> None:
        self.event = TokenEvent(self.request_id, token, self._take_text(), self.finish_reason)
        if self._observer is not None:
            self._observer.advanced(self.event)

    def _record_prompt_logprobs(self, item: Work, logits: Logits) -> None:
        """Rows of the prompt that are seen for the first time; after a preemption they come again."""
        count = self._params.prompt_logprobs or 0
        known, prompt = self._prompt_logprobs, self.sequence.token_ids[: self.sequence.prompt_len]
        for position, row in zip(range(item.end - item.num_logits, item.end), logits, strict=True):
            if position + 1 == len(known) < len(prompt):
                known.append(top_logprobs(row, prompt[position + 1], count))

    def _record_logprobs(self, logits: Logits, token: int) -> None:
        if self._params.logprobs is not None:
            entry = top_logprobs(logits, token, self._params.logprobs)
            self._logprobs.append(entry)
            self._cumulative_logprobs.append(self._cumulative_logprobs[-1] + entry[token].logprob)
        if self._observer is not None:
            self._observer.sampled(self.sequence.num_tokens, logits)

    def _check_stop(self, token: int) -> None:
        if token in self._stop_token_ids:
            self.finish_reason, self._stop_reason = "stop", token
            return
        if token in self._eos_token_ids:
            self.finish_reason = "stop"
            return
        if self._detokenizer:
            self._detokenizer.append(token)
            if self._detokenizer.stop_match is not None:
                self.finish_reason, self._stop_reason = "stop", self._detokenizer.stop_match
                return
        if self._constraint and self._constraint.complete and not self._eos_token_ids:
            self.finish_reason = "stop"
            return
        if self.sequence.num_tokens + 1 >= self.sequence.max_len:
            self.finish_reason = "length"

    def _take_text(self) -> str:
        if self._detokenizer is None:
            return ""
        if self.finished:
            self._detokenizer.close()
        return self._detokenizer.take()
