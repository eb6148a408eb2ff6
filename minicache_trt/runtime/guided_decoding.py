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


class _Matcher(Protocol):
    def is_error(self) -> bool: ...

    def get_error(self) -> str: ...

    def is_stopped(self) -> bool: ...

    def compute_bitmask(self) -> bytes: ...

    def consume_token(self, token: int) -> bool: ...


class Constraint:
    """The state of one output under its constraint. It depends on the sampled tokens alone, not on the schedule.

    Parameters
    ----------
    matcher : LLMatcher
        At the beginning of its grammar; its tokenizer's one end token is ``eos_token_ids[0]``, where there is one.
    vocab_size : int
        Of the model.
    eos_token_ids : tuple of int
        All of them may end a complete output.
    may_end : bool
        Otherwise they never come, and the caller ends the output when it is complete.
    """

    def __init__(
        self, matcher: _Matcher, vocab_size: int, eos_token_ids: tuple[int, ...], may_end: bool = True
    ) -> None:
        self._matcher = matcher
        self._vocab_size = vocab_size
        self._eos_token_ids = eos_token_ids
        self._may_end = may_end

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
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        allowed = np.unpackbits(bits, count=self._vocab_size, bitorder="little").astype(np.bool_)
        self._check()
        if self._eos_token_ids:
            allowed[list(self._eos_token_ids)] = self._may_end and allowed[self._eos_token_ids[0]]
        if not allowed.any():
            raise ValueError("guided_decoding: no token of this model continues the output")
        return allowed

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

    def _check(self) -> None:
        if self._matcher.is_error():
            raise ValueError(f"guided_decoding: {first_line(self._matcher.get_error())}")


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

    def start(self, params: GuidedDecodingParams, may_end: bool) -> Constraint:
        """The beginning of an output; ``may_end``: by an end-of-sequence token.

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
        vocabulary = self._vocabulary()
        try:
            matcher = LLMatcher(vocabulary, _grammar(LLMatcher, params), log_level=0)
        except ValueError as error:
            raise UserError(f"guided_decoding: {first_line(str(error))}") from error
        if matcher.is_error():
            raise UserError(f"guided_decoding: {first_line(matcher.get_error())}")
        return Constraint(matcher, self._vocab_size, self._eos_token_ids, may_end)

    def _vocabulary(self) -> Any:
        """The tokenizer as llguidance wants it, made once."""
        from llguidance.hf import from_tokenizer

        tokenizer: Any = self._tokenizer
        if not getattr(tokenizer, "is_fast", False):
            raise UserError("guided decoding needs a fast Hugging Face tokenizer (tokenizer.json), this model has none")
        with self._lock:
            if self._library_tokenizer is None:
                size = max(len(tokenizer), self._vocab_size)
                # Without an end token of its own a vocabulary gets one that no model can sample.
                eos = self._eos_token_ids[0] if self._eos_token_ids else size
                self._library_tokenizer = from_tokenizer(tokenizer, n_vocab=max(size, eos + 1), eos_token=eos)
            return self._library_tokenizer


def first_line(text: str) -> str:
    """The first line of a library's message."""
    return text.strip().split("\n", 1)[0]


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
