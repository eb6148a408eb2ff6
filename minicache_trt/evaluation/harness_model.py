"""An engine as lm-eval-harness's language model; imported only where lm-eval is installed."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from minicache_trt.errors import UserError
from minicache_trt.evaluation.examples import Example
from minicache_trt.evaluation.scoring import exact_prefix, score_examples
from minicache_trt.runtime.llm import LLM
from minicache_trt.runtime.request import SamplingParams

MAX_GEN_TOKENS = 256
Encoded = tuple[Any, list[int], list[int]]
"""What the request was, and the token ids of its context and its continuation."""


class EngineLM(TemplateLM):  # type: ignore[misc]
    """Answers requests through an engine's cache.

    A context without its last token is a prompt, prefilled; that token and a continuation are computed as decoded, so
    every scored token reads the context compressed where it is out of the exact window. Rolling windows are text: only
    their first tokens are a prompt. To generate, the whole context is a prompt. What is too long loses tokens on the
    left, as with lm-eval-harness's own models.

    Parameters
    ----------
    llm : LLM
        With a tokenizer.
    """

    def __init__(self, llm: LLM) -> None:
        super().__init__()
        self._llm = llm
        self.tokenizer: Any = llm.tokenizer
        self._build = llm.engine.build

    @property
    def max_length(self) -> int:
        """Tokens of a sequence the engine was built for."""
        return self._build.max_seq_len

    @property
    def eot_token_id(self) -> int:
        found: int | None = self.tokenizer.eos_token_id
        if found is None:
            raise UserError("the tokenizer has no end-of-sequence token, which lm-eval-harness needs")
        return found

    @property
    def prefix_token_id(self) -> int:
        """What an empty context is replaced by: the BOS token, or else the end token."""
        found: int | None = self.tokenizer.bos_token_id
        return self.eot_token_id if found is None else found

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids; text that begins with the BOS token gets no second one."""
        bos = self.tokenizer.bos_token
        special = not (bos and string.startswith(bos)) if add_special_tokens is None else add_special_tokens
        ids: list[int] = self.tokenizer.encode(string, add_special_tokens=special)
        return ids

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The checkpoint's own template."""
        text: str = self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        return text

    def _loglikelihood_tokens(self, requests: list[Encoded], **_: Any) -> list[tuple[float, bool]]:
        return self._score([(context, continuation, len(context) - 1) for _, context, continuation in requests])

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, in windows of the engine's length of which every token is scored once."""
        counts, windows = [], []
        for request in requests:
            tokens = self.tok_encode(request.args[0])
            some = list(
                map(make_disjoint_window, get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, 1))
            )
            counts.append(len(some))
            windows += some
        scores = self._score([(context, text, exact_prefix(self._build)) for context, text in windows])
        found = iter(logprob for logprob, _ in scores)
        return [sum(itertools.islice(found, count)) for count in counts]

    def _score(self, requests: Sequence[tuple[list[int], list[int], int]]) -> list[tuple[float, bool]]:
        """Log-likelihoods of continuations, and whether greedy decoding would write them; with tokens of a prompt."""
        examples = []
        for context, continuation, prompt in requests:
            # One token more than the engine holds: nothing is computed for the last one.
            tokens = [*context, *continuation][-(self.max_length + 1) :]
            first = max(1, len(tokens) - len(continuation))
            cut = len(context) + len(continuation) - len(tokens)
            examples.append(Example(tokens, ((first, len(tokens)),), min(max(1, prompt - cut), len(tokens) - 1)))
        scores = score_examples(
            self._llm, examples, exact_prefix(self._build), self._build.max_batch_size, lambda done: None
        )
        return [(-float(nll), bool(exact)) for nll, exact in zip(scores.nll, scores.exact, strict=True)]

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Continuations up to the first stop string, the end token, or ``max_gen_toks``."""
        prompts, params = [], []
        for request in requests:
            context, wanted = request.args
            settings = normalize_gen_kwargs(dict(wanted), MAX_GEN_TOKENS)
            limit = min(settings["max_gen_toks"], self.max_length - 1)
            stop = handle_stop_sequences(settings.get("until"), None)
            prompts.append(self.tok_encode(context)[-(self.max_length - limit) :])
            sampled = settings.get("do_sample", False)
            params.append(
                SamplingParams(
                    max_tokens=limit,
                    temperature=float(settings.get("temperature", 1.0)) if sampled else 0.0,
                    top_p=float(settings.get("top_p", 1.0)) if sampled else 1.0,
                    top_k=int(settings.get("top_k", 0)) if sampled else 0,
                    seed=int(np.uint32(len(prompts))) if sampled else None,
                    stop=[text for text in stop if text],
                )
            )
        outputs = self._llm.generate(prompts, params)
        return [output.outputs[0].text for output in outputs]
