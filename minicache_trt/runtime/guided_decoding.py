"""Outputs of a given form: which tokens may come next."""

from __future__ import annotations

import json
import threading
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from minicache_trt.errors import UserError
from minicache_trt.runtime.sampling_params import GuidedDecodingParams
from minicache_trt.runtime.tokenizer import Tokenizer

WHITESPACE = r"[ \n\t]{1,20}"
LONGEST_LINE = 200
"""Of a message; the library repeats the grammar in its own."""


class _Matcher(Protocol):
    def is_error(self) -> bool: ...

    def get_error(self) -> str: ...

    def is_stopped(self) -> bool: ...

    def compute_bitmask(self) -> bytes: ...

    def consume_token(self, token: int) -> bool: ...


class Constraint:
    """The state of one output under its constraint. It depends on the sampled tokens alone, not on the schedule.

    The first mask, which takes the longest, is made with the constraint.

    Parameters
    ----------
    matcher : LLMatcher
        At the beginning of its grammar.
    vocab_size : int
        Of the model.
    end_token : int
        What the matcher takes for the end of the output.
    eos_token_ids : tuple of int
        All of them may end a complete output; without any, the caller ends it when it is complete.

    Raises
    ------
    ValueError
        As `allowed`.
    """

    def __init__(self, matcher: _Matcher, vocab_size: int, end_token: int, eos_token_ids: tuple[int, ...]) -> None:
        self._matcher = matcher
        self._vocab_size = vocab_size
        self._end_token = end_token
        self._eos_token_ids = eos_token_ids
        self._first: NDArray[np.bool_] | None = self._compute()

    @property
    def complete(self) -> bool:
        """Whether nothing can follow but the end."""
        return self._matcher.is_stopped()

    def allowed(self) -> NDArray[np.bool_]:
        """Tokens that may come, bool ``[vocab]``; the end tokens among them when the output may end here.

        Raises
        ------
        ValueError
            When nothing may come, or the matcher has given up because the grammar became too complex.
        """
        first, self._first = self._first, None
        return self._compute() if first is None else first

    def accept(self, token: int) -> None:
        """The token was sampled.

        Raises
        ------
        ValueError
            When it was not allowed.
        """
        if token not in self._eos_token_ids:
            self._matcher.consume_token(token)
            self._check()

    def _compute(self) -> NDArray[np.bool_]:
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        allowed = np.unpackbits(bits, count=self._vocab_size, bitorder="little").astype(np.bool_)
        self._check()
        may_end = allowed[self._end_token]
        allowed[self._end_token] = False
        allowed[list(self._eos_token_ids)] = may_end
        if not allowed.any():
            raise ValueError("guided_decoding: no token of this model continues the output")
        return allowed

    def _check(self) -> None:
        if self._matcher.is_error():
            raise ValueError(f"guided_decoding: {summary(self._matcher.get_error())}")


class GuidedDecoder:
    """Makes constraints for one tokenizer; the work is llguidance's. Any thread may use it.

    Parameters
    ----------
    tokenizer : Tokenizer, optional
        A fast Hugging Face tokenizer is needed.
    vocab_size : int
        Of the model.
    eos_token_ids : tuple of int
        The model's.
    """

    def __init__(self, tokenizer: Tokenizer | None, vocab_size: int, eos_token_ids: tuple[int, ...]) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._eos_token_ids = eos_token_ids
        self._lock = threading.Lock()
        self._library_tokenizer: Any = None

    def start(self, params: GuidedDecodingParams, ignore_eos: bool) -> Constraint:
        """The beginning of an output; ``ignore_eos``: no end-of-sequence token may come.

        Raises
        ------
        UserError
            When the constraint cannot be understood, or this installation or tokenizer cannot do it.
        """
        try:
            from llguidance import LLMatcher
        except ImportError as error:
            raise UserError(
                "guided decoding needs the package llguidance", "install it: pip install 'minicache-trt[guided]'"
            ) from error
        vocabulary, end_token = self._vocabulary()
        try:
            matcher = LLMatcher(vocabulary, _grammar(LLMatcher, params), log_level=0)
        except ValueError as error:
            raise UserError(f"guided_decoding: {summary(str(error))}") from error
        if matcher.is_error():
            raise UserError(f"guided_decoding: {summary(matcher.get_error())}")
        try:
            return Constraint(matcher, self._vocab_size, end_token, () if ignore_eos else self._eos_token_ids)
        except ValueError as error:
            raise UserError(str(error)) from error

    def _vocabulary(self) -> tuple[Any, int]:
        """The tokenizer as llguidance wants it, made once, and the token it takes for the end."""
        from llguidance.hf import from_tokenizer

        tokenizer: Any = self._tokenizer
        if not getattr(tokenizer, "is_fast", False):
            raise UserError("guided decoding needs a fast Hugging Face tokenizer (tokenizer.json), this model has none")
        # Where the model has no end token, some special one stands in that no output contains.
        ends = [token for token in (*self._eos_token_ids, *tokenizer.all_special_ids, 0) if token < len(tokenizer)]
        with self._lock:
            if self._library_tokenizer is None:
                size = max(len(tokenizer), self._vocab_size)
                self._library_tokenizer = from_tokenizer(tokenizer, n_vocab=size, eos_token=ends[0])
            return self._library_tokenizer, ends[0]


def summary(text: str) -> str:
    """A library's message of many lines on one that is not too long: the first, and the one that says what is wrong."""
    first, *others = text.strip().split("\n")
    return " ".join(line[:LONGEST_LINE] for line in [first, *(line for line in others if line.startswith("error: "))])


def _grammar(matcher: Any, params: GuidedDecodingParams) -> str:
    if params.regex is not None:
        return str(matcher.grammar_from_regex(params.regex))
    if params.choice is not None:
        alternatives = " | ".join(json.dumps(text, ensure_ascii=False) for text in params.choice)
        return str(matcher.grammar_from_lark(f"start: {alternatives}"))
    if params.grammar is not None:
        return str(matcher.grammar_from_lark(params.grammar))
    schema = {"type": "object"} if params.json_object else params.json
    pattern = WHITESPACE if params.whitespace_pattern is None else params.whitespace_pattern
    spaces = {"whitespace_pattern": pattern} if pattern else {"whitespace_flexible": False}
    return str(matcher.grammar_from_json_schema(schema, overrides=spaces))
