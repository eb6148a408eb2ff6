"""``/v1/completions``."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response

from minicache_trt.runtime.prompts import PromptLike
from minicache_trt.runtime.request import CompletionOutput, RequestOutput
from minicache_trt.serving.answering import Answer, Answering, usage
from minicache_trt.serving.completion_models import (
    CompletionChoice,
    CompletionLogprobs,
    CompletionRequest,
    CompletionResponse,
)
from minicache_trt.serving.errors import ApiError
from minicache_trt.serving.logprobs import completion_logprobs
from minicache_trt.serving.parameters import sampling_params
from minicache_trt.serving.protocol import Usage
from minicache_trt.serving.service import Prompts
from minicache_trt.serving.token_text import TokenText

DEFAULT_MAX_TOKENS = 16
"""OpenAI's for this API."""


async def complete(answering: Answering, texts: TokenText, request: Request, body: CompletionRequest) -> Response:
    """Answer one call.

    Raises
    ------
    ApiError, ClientGone
    """
    arrival = time.perf_counter()
    model = answering.check_model(body)
    wanted = _prompts(body)
    answer = Answer.new("cmpl", model)
    requests = await answering.start(request, wanted.num_sequences, lambda: wanted, arrival)
    if not body.stream:
        return await answering.answer(request, requests, lambda outputs: _response(answer, body, texts, outputs))
    choices = [ChoiceStream(index, body, texts) for index in range(len(requests))]

    def chunks(index: int, output: RequestOutput) -> Iterator[BaseModel]:
        choice = choices[index].advance(output)
        if choice is not None:
            yield _completion(answer, [choice], None)

    with_usage = body.stream_options is not None and body.stream_options.include_usage
    last = (lambda counts: _completion(answer, [], counts)) if with_usage else None
    return answering.stream(requests, chunks, last, len(wanted.prompts))


class ChoiceStream:
    """One choice of a response, piece by piece.

    Parameters
    ----------
    index : int
        Of the choice.
    body : CompletionRequest
    texts : TokenText
    """

    def __init__(self, index: int, body: CompletionRequest, texts: TokenText) -> None:
        self._index = index
        self._body = body
        self._texts = texts
        self._offset = 0
        self._begun = False

    def advance(self, output: RequestOutput) -> CompletionChoice | None:
        """What is new; None when there is nothing to tell yet."""
        completion = output.outputs[0]
        text, tokens = completion.text_diff, completion.token_ids_diff
        start = len(completion.token_ids) - len(tokens)
        entries: list[Any] = [] if completion.logprobs is None else list(completion.logprobs[start:])
        if self._body.max_tokens == 0:
            text, tokens, entries = "", [], []
        if self._body.echo and not self._begun:
            text = _prompt_text(output, self._texts) + text
            tokens = [*output.prompt_token_ids, *tokens]
            entries = [*(output.prompt_logprobs or []), *entries]
        self._begun = True
        logprobs = self._logprobs(tokens, entries)
        if not (text or logprobs or completion.finish_reason):
            return None
        return CompletionChoice(
            index=self._index,
            text=text,
            logprobs=logprobs,
            finish_reason=completion.finish_reason,
            stop_reason=completion.stop_reason,
        )

    def _logprobs(self, tokens: list[int], entries: list[Any]) -> CompletionLogprobs | None:
        if self._body.logprobs is None or not tokens:
            return None
        result = completion_logprobs(tokens, entries, self._body.logprobs, self._texts, self._offset)
        self._offset = result.text_offset[-1] + len(result.tokens[-1])
        return result


def _prompts(body: CompletionRequest) -> Prompts:
    if body.suffix:
        raise ApiError(400, "suffix: insertion is not supported; leave suffix out", param="suffix")
    if body.max_tokens == 0 and not body.echo:
        raise ApiError(400, "max_tokens: expected a positive number, got 0; 0 needs echo", param="max_tokens")
    max_tokens = DEFAULT_MAX_TOKENS if body.max_tokens is None else max(1, body.max_tokens)
    params = sampling_params(body, max_tokens, body.logprobs, body.logprobs if body.echo else None)
    return Prompts(_prompt_list(body.prompt), params, body.n or 1, body.priority or 0, body.cache_salt)


def _prompt_list(prompt: str | list[str] | list[int] | list[list[int]]) -> list[PromptLike]:
    if not prompt and not isinstance(prompt, str):
        raise ApiError(400, "prompt: expected at least one, got none", param="prompt")
    if isinstance(prompt, str):
        return [prompt]
    token_ids = [item for item in prompt if isinstance(item, int)]
    if token_ids:
        return [{"prompt_token_ids": token_ids}]
    items = [item for item in prompt if not isinstance(item, int)]
    return [item if isinstance(item, str) else {"prompt_token_ids": item} for item in items]


def _prompt_text(output: RequestOutput, texts: TokenText) -> str:
    if output.prompt is not None:
        return output.prompt
    return b"".join(map(texts.bytes_of, output.prompt_token_ids)).decode(errors="replace")


def _response(
    answer: Answer, body: CompletionRequest, texts: TokenText, outputs: list[RequestOutput]
) -> CompletionResponse:
    choices = []
    for index, output in enumerate(outputs):
        choice = ChoiceStream(index, body, texts).advance(_all_new(output))
        assert choice is not None  # it has a finish_reason
        choices.append(choice)
    prompts = len(outputs) // (body.n or 1)
    return _completion(answer, choices, usage(outputs, prompts))


def _all_new(output: RequestOutput) -> RequestOutput:
    """A finished output as a stream that was read once would have had it."""
    completion: CompletionOutput = output.outputs[0]
    whole = replace(completion, text_diff=completion.text, token_ids_diff=completion.token_ids)
    return replace(output, outputs=[whole])


def _completion(answer: Answer, choices: list[CompletionChoice], counts: Usage | None) -> CompletionResponse:
    return CompletionResponse(id=answer.id, created=answer.created, model=answer.model, choices=choices, usage=counts)
