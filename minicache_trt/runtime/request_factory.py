"""From prompts and parameters to generations."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path

from minicache_trt.config import BuildConfig, ModelConfig
from minicache_trt.errors import UserError
from minicache_trt.runtime.detokenizer import TokenDecoder
from minicache_trt.runtime.generation import Generation
from minicache_trt.runtime.guided_decoding import Constraint, GuidedDecoder
from minicache_trt.runtime.observer import RequestObserver
from minicache_trt.runtime.prompts import PromptLike, parse_prompts
from minicache_trt.runtime.request import DEFAULT_OPTIONS, RequestOptions, SamplingParams
from minicache_trt.runtime.tokenizer import Tokenizer, load_tokenizer


class RequestFactory:
    """Checks what callers ask of an engine and makes generations of it, numbered in order.

    Parameters
    ----------
    model, build : ModelConfig, BuildConfig
        The engine's.
    tokenizer : Tokenizer or path, optional
        A path is loaded on first use.
    """

    def __init__(self, model: ModelConfig, build: BuildConfig, tokenizer: Tokenizer | str | Path | None) -> None:
        self._model = model
        self._build = build
        self._tokenizer_source = tokenizer
        self._request_ids = itertools.count()
        self._guided_decoder: GuidedDecoder | None = None

    @property
    def tokenizer(self) -> Tokenizer | None:
        """Loaded on first use; None when there is none."""
        if isinstance(self._tokenizer_source, str | Path):
            self._tokenizer_source = load_tokenizer(Path(self._tokenizer_source))
        return self._tokenizer_source

    @cached_property
    def _decoder(self) -> TokenDecoder | None:
        return None if self.tokenizer is None else TokenDecoder(self.tokenizer)

    def many(
        self,
        prompts: PromptLike | Sequence[PromptLike],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        options: RequestOptions = DEFAULT_OPTIONS,
        observer: RequestObserver | None = None,
    ) -> list[Generation]:
        """One generation per prompt, in order; parameters are for all, or one per prompt.

        Raises
        ------
        UserError
            When a prompt or parameter cannot be used.
        """
        parsed = parse_prompts(prompts, self.tokenizer, self._model.vocab_size, self._build.max_seq_len)
        if sampling_params is None or isinstance(sampling_params, SamplingParams):
            params = [sampling_params or SamplingParams()] * len(parsed)
        else:
            params = list(sampling_params)
        if len(params) != len(parsed):
            raise UserError(f"sampling_params: expected 1 or {len(parsed)} (one per prompt), got {len(params)}")
        if self.tokenizer is None and any(item.stop_strings for item in params):
            raise UserError("stop: stop strings need a tokenizer", "use stop_token_ids, or pass tokenizer=")
        for item in params:
            self._check_token_ids(item)
        return [
            Generation(
                request_id=str(next(self._request_ids)),
                prompt=prompt.text,
                token_ids=prompt.token_ids,
                params=item,
                max_seq_len=self._build.max_seq_len,
                eos_token_ids=self._model.eos_token_ids,
                decoder=self._decoder,
                options=replace(options, cache_salt=options.cache_salt or prompt.cache_salt),
                constraint=self._constraint(item),
                observer=observer,
            )
            for prompt, item in zip(parsed, params, strict=True)
        ]

    def one(
        self,
        prompt: PromptLike,
        sampling_params: SamplingParams | None,
        options: RequestOptions = DEFAULT_OPTIONS,
        observer: RequestObserver | None = None,
    ) -> Generation:
        """The generation of a single prompt.

        Raises
        ------
        UserError
            When it cannot be used, or there are several.
        """
        generations = self.many(prompt, sampling_params, options, observer)
        if len(generations) != 1:
            raise UserError(f"expected one prompt, got {len(generations)}", "use generate, or one call for each")
        return generations[0]

    def _check_token_ids(self, params: SamplingParams) -> None:
        for name, tokens in (("stop_token_ids", params.stop_token_ids), ("logit_bias", params.logit_bias)):
            outside = [token for token in tokens or () if not 0 <= token < self._model.vocab_size]
            if outside:
                raise UserError(f"{name}: expected token ids from 0 to {self._model.vocab_size - 1}, got {outside[0]}")

    def _constraint(self, params: SamplingParams) -> Constraint | None:
        if params.guided_decoding is None:
            return None
        if self._guided_decoder is None:
            eos_token_ids = self._model.eos_token_ids
            self._guided_decoder = GuidedDecoder(self.tokenizer, self._model.vocab_size, eos_token_ids)
        return self._guided_decoder.start(params.guided_decoding, params.ignore_eos)


def request_options(priority: int, cache_salt: str | None, timeout: float | None) -> RequestOptions:
    """A request's place among others; ``timeout`` counts in seconds from now.

    Raises
    ------
    UserError
        Naming the option that cannot be used.
    """
    if timeout is not None and not (timeout > 0 and math.isfinite(timeout)):
        raise UserError(f"timeout: expected a positive finite number of seconds, got {timeout}")
    try:
        return RequestOptions(priority, cache_salt, None if timeout is None else time.monotonic() + timeout)
    except ValueError as error:
        raise UserError(str(error)) from error
