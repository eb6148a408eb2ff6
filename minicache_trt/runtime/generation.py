"""The two kinds of work a sequence can do: generate text, or score given tokens."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from minicache_trt.runtime.request import CompletionOutput, Logprob, RequestOutput, SamplingParams, Sequence
from minicache_trt.runtime.sampler import Logits, NonFiniteLogits, sample, top_logprobs
from minicache_trt.runtime.scheduler import Work
from minicache_trt.runtime.tokenizer import Detokenizer, Tokenizer


@dataclass(frozen=True)
class TokenEvent:
    """A request advanced.

    Parameters
    ----------
    token_id : int, optional
        The sampled token; None when the request ended with an error.
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
    tokenizer : Tokenizer, optional
        Without one the text stays empty.
    """

    def __init__(
        self,
        request_id: str,
        prompt: str | None,
        token_ids: list[int],
        params: SamplingParams,
        max_seq_len: int,
        eos_token_ids: tuple[int, ...],
        tokenizer: Tokenizer | None,
    ) -> None:
        max_len = min(len(token_ids) + params.max_tokens, max_seq_len)
        self.sequence = Sequence(list(token_ids), len(token_ids), max_len)
        self.request_id = request_id
        self.event: TokenEvent | None = None
        self.finish_reason: str | None = "length" if max_len == len(token_ids) else None
        self._prompt = prompt
        self._params = params
        self._eos_token_ids = frozenset(() if params.ignore_eos else eos_token_ids)
        self._stop_token_ids = frozenset(params.stop_token_ids or ())
        self._generator = np.random.default_rng(params.seed)
        self._detokenizer = Detokenizer(tokenizer, list(token_ids), params.stop_strings) if tokenizer else None
        self._logprobs: list[dict[int, Logprob]] = []
        self._cumulative_logprob = 0.0
        self._stop_reason: int | str | None = None

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None

    def advance(self, item: Work, logits: Logits) -> int | None:
        """Sample when the item reached the last known token."""
        self.event = None
        if item.end < self.sequence.num_tokens:
            return None
        token: int | None
        try:
            token = sample(logits[-1], self._params, self.sequence.token_ids, self._generator)
            self._record_logprobs(logits[-1], token)
            self._check_stop(token)
        except NonFiniteLogits as error:
            token = None
            self.finish_reason, self._stop_reason = "error", str(error)
        self.event = TokenEvent(self.request_id, token, self._take_text(), self.finish_reason)
        return token

    def output(self) -> RequestOutput:
        """The request as it stands."""
        requested = self._params.logprobs is not None
        tokens = self.sequence.token_ids
        completion = CompletionOutput(
            index=0,
            text=self._detokenizer.text if self._detokenizer else "",
            token_ids=tokens[self.sequence.prompt_len :],
            cumulative_logprob=self._cumulative_logprob if requested else None,
            logprobs=self._logprobs if requested else None,
            finish_reason=self.finish_reason,
            stop_reason=self._stop_reason,
        )
        prompt_ids = tokens[: self.sequence.prompt_len]
        return RequestOutput(self.request_id, self._prompt, prompt_ids, [completion], self.finished)

    def _record_logprobs(self, logits: Logits, token: int) -> None:
        if self._params.logprobs is not None:
            entry = top_logprobs(logits, token, self._params.logprobs)
            self._logprobs.append(entry)
            self._cumulative_logprob += entry[token].logprob

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
        if self.sequence.num_tokens + 1 >= self.sequence.max_len:
            self.finish_reason = "length"

    def _take_text(self) -> str:
        if self._detokenizer is None:
            return ""
        if self.finished:
            self._detokenizer.close()
        return self._detokenizer.take()


class Scoring:
    """Logits of given tokens: the prompt is prefilled, the continuation decoded token by token.

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
    """

    def __init__(self, token_ids: list[int], prompt_len: int, start: int, vocab_size: int) -> None:
        self.sequence = Sequence(list(token_ids[:prompt_len]), prompt_len, len(token_ids), logits_start=start)
        self.logits: NDArray[np.float32] = np.zeros((max(0, len(token_ids) - start), vocab_size), np.float32)
        self.finished = False
        self._token_ids = token_ids
        self._start = start

    def advance(self, item: Work, logits: Logits) -> int | None:
        """Keep the item's logits and feed the next given token."""
        if item.num_logits:
            self.logits[item.end - item.num_logits - self._start : item.end - self._start] = logits
        self.finished = item.end == len(self._token_ids)
        if self.finished or item.end < self.sequence.num_tokens:
            return None
        return self._token_ids[item.end]
