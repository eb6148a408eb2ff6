"""How a caller wants tokens to be chosen."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any


def expect(condition: bool, name: str, expected: str, got: object) -> None:
    """Raise ValueError in the form of this package unless the condition holds."""
    if not condition:
        raise ValueError(f"{name}: expected {expected}, got {got!r}")


@dataclass(frozen=True)
class GuidedDecodingParams:
    """What the whole output must look like; exactly one of these, field names of vLLM's and TensorRT-LLM's class.

    Parameters
    ----------
    json : str or dict, optional
        JSON schema the output must parse and validate under.
    regex : str, optional
        Regular expression the output must match from beginning to end (Rust's syntax: no look-around, no
        back-references).
    choice : list of str, optional
        The output is one of these.
    grammar : str, optional
        Context-free grammar in Lark's syntax.
    json_object : bool
        Any JSON object.
    whitespace_pattern : str, optional
        Regular expression for the white space between the parts of JSON. Default: at most 20 blanks or line breaks,
        so that no output is white space without end; an empty pattern allows none.
    """

    json: str | dict[str, Any] | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool = False
    whitespace_pattern: str | None = None

    def __post_init__(self) -> None:
        constraints = [item.name for item in fields(self) if item.name != "whitespace_pattern"]
        given = [name for name in constraints if getattr(self, name) not in (None, False)]
        expect(len(given) == 1, "guided_decoding", f"one of {', '.join(constraints)}", given or None)
        usable = self.choice is None or (bool(self.choice) and "" not in self.choice)
        expect(usable, "choice", "at least one text, none of them empty", self.choice)


@dataclass(frozen=True)
class SamplingParams:
    """How to choose tokens and when to stop; field names of vLLM's and TensorRT-LLM's class.

    Logits are changed in this order: logit bias, repetition penalty, frequency and presence penalty, tokens that must
    not come, temperature, top-k, top-p, min-p (the last five as in Hugging Face's generation).

    Parameters
    ----------
    max_tokens : int
        Most tokens to generate.
    temperature : float
        Divides the logits; 0 takes the most likely token (greedy).
    top_k : int
        Candidates kept, 0 or -1 for all. Ties with the last one are kept.
    top_p : float
        Smallest set of candidates whose probabilities add up to at least this, in (0, 1].
    min_p : float
        Candidates less likely than this share of the most likely one are dropped, in [0, 1].
    repetition_penalty : float
        Positive logits of tokens in prompt or output are divided by it, negative ones multiplied
        (arXiv 1909.05858); 1 is off.
    presence_penalty, frequency_penalty : float
        Taken off the logits of tokens in the output, once and once per occurrence, in [-2, 2], as in OpenAI's API.
    logit_bias : dict of int to float, optional
        Added to the logits of tokens, in [-100, 100].
    min_tokens : int
        No end-of-sequence or stop token comes before the output has so many tokens.
    seed : int, optional
        Makes the request repeatable, whatever it runs next to.
    stop : str or list of str, optional
        Generation ends at the first of these; the text is cut before it.
    stop_token_ids : list of int, optional
        Generation ends after one of these; the text does not contain it.
    ignore_eos : bool
        Go on after the model's end-of-sequence tokens.
    logprobs : int, optional
        Return this many most likely tokens (and the chosen one) for each generated token.
    prompt_logprobs : int, optional
        The same for the prompt, whose cached prefix is then not used.
    guided_decoding : GuidedDecodingParams, optional
        Only tokens that lead to such an output can come; the output ends when it is complete.
    """

    max_tokens: int = 16
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    logprobs: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | None = None
    min_tokens: int = 0
    prompt_logprobs: int | None = None
    guided_decoding: GuidedDecodingParams | None = None

    def __post_init__(self) -> None:
        expect(self.max_tokens >= 1, "max_tokens", "a positive number", self.max_tokens)
        finite = math.isfinite(self.temperature)
        expect(finite and self.temperature >= 0, "temperature", "a finite number of at least 0", self.temperature)
        expect(self.top_k >= -1, "top_k", "a positive number, or 0 or -1 for all", self.top_k)
        expect(0 < self.top_p <= 1, "top_p", "a number in (0, 1]", self.top_p)
        expect(0 <= self.min_p <= 1, "min_p", "a number in [0, 1]", self.min_p)
        penalty = self.repetition_penalty
        expect(math.isfinite(penalty) and penalty > 0, "repetition_penalty", "a positive finite number", penalty)
        for name in ("presence_penalty", "frequency_penalty"):
            expect(-2 <= getattr(self, name) <= 2, name, "a number in [-2, 2]", getattr(self, name))
        bias = self.logit_bias or {}
        usable = all(token >= 0 and -100 <= value <= 100 for token, value in bias.items())
        expect(usable, "logit_bias", "token ids with numbers in [-100, 100]", self.logit_bias)
        in_range = 0 <= self.min_tokens <= self.max_tokens
        expect(in_range, "min_tokens", f"a number from 0 to max_tokens ({self.max_tokens})", self.min_tokens)
        expect(self.seed is None or self.seed >= 0, "seed", "a number of at least 0", self.seed)
        expect("" not in self.stop_strings, "stop", "strings that are not empty", self.stop)
        for name in ("logprobs", "prompt_logprobs"):
            count = getattr(self, name)
            expect(count is None or count >= 0, name, "a number of at least 0", count)

    @property
    def stop_strings(self) -> tuple[str, ...]:
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
