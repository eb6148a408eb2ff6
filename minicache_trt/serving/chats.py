"""``/v1/chat/completions``."""

from __future__ import annotations

import time
from collections.abc import Iterator

from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response

from minicache_trt.runtime.request import CompletionOutput, RequestOutput
from minicache_trt.serving.answering import Answer, Answering, usage
from minicache_trt.serving.chat_models import (
    AnswerMessage,
    ChatChoice,
    ChatChunk,
    ChatLogprobs,
    ChatMessage,
    ChatRequest,
    ChatResponse,
    ChunkChoice,
    Delta,
)
from minicache_trt.serving.chat_template import ChatTemplate
from minicache_trt.serving.errors import ApiError
from minicache_trt.serving.logprobs import chat_logprobs
from minicache_trt.serving.parameters import sampling_params
from minicache_trt.serving.protocol import Usage
from minicache_trt.serving.service import Prompts
from minicache_trt.serving.token_text import TokenText


async def chat(
    answering: Answering, template: ChatTemplate, texts: TokenText, request: Request, body: ChatRequest
) -> Response:
    """Answer one call.

    Raises
    ------
    ApiError, ClientGone
    """
    arrival = time.perf_counter()
    answer = Answer.new("chatcmpl", answering.check_model(body))
    _refuse_tools(body)
    max_seq_len = answering.service.llm.engine.build.max_seq_len
    requests = await answering.start(request, body.n or 1, lambda: _prompts(body, template, max_seq_len), arrival)
    if not body.stream:
        return await answering.answer(request, requests, lambda outputs: _response(answer, body, texts, outputs))
    begun: set[int] = set()

    def chunks(index: int, output: RequestOutput) -> Iterator[BaseModel]:
        choice = _chunk(index, output.outputs[0], body, texts)
        if index not in begun:
            begun.add(index)
            first = ChunkChoice(index=index, delta=Delta(role="assistant", content=""))
            yield _chat_chunk(answer, [first], None)
        if choice is not None:
            yield _chat_chunk(answer, [choice], None)

    with_usage = body.stream_options is not None and body.stream_options.include_usage
    last = (lambda counts: _chat_chunk(answer, [], counts)) if with_usage else None
    return answering.stream(requests, chunks, last, 1)


def messages_for_template(messages: list[ChatMessage]) -> list[dict[str, str]]:
    """Roles and texts, as chat templates read them.

    Raises
    ------
    ApiError
        For content that is not text.
    """
    result = []
    for index, message in enumerate(messages):
        content = message.content
        if isinstance(content, list):
            others = [part.type for part in content if part.type != "text" or part.text is None]
            if others:
                raise ApiError(
                    400, f"messages[{index}].content: only text can be read, got {others[0]!r}", param="messages"
                )
            content = "".join(part.text or "" for part in content)
        turn = {"role": message.role, "content": content or ""}
        result.append(turn if message.name is None else {**turn, "name": message.name})
    return result


def _refuse_tools(body: ChatRequest) -> None:
    if body.tools and body.tool_choice != "none":
        raise ApiError(400, "tools: calls of tools are not supported; leave tools out", param="tools")


def _prompts(body: ChatRequest, template: ChatTemplate, max_seq_len: int) -> Prompts:
    token_ids = template.token_ids(
        messages_for_template(body.messages),
        body.add_generation_prompt is not False and not body.continue_final_message,
        bool(body.continue_final_message),
        body.chat_template_kwargs,
    )
    limit = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    name = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
    if limit == 0:
        raise ApiError(400, f"{name}: expected a positive number, got 0", param=name)
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    if body.top_logprobs is not None and not body.logprobs:
        raise ApiError(400, "top_logprobs: needs logprobs to be true", param="top_logprobs")
    # Without a limit, an answer may be as long as there is room.
    params = sampling_params(body, max_seq_len if limit is None else limit, logprobs)
    return Prompts([token_ids], params, body.n or 1, body.priority or 0, body.cache_salt)


def _logprobs(
    completion: CompletionOutput, tokens: list[int], body: ChatRequest, texts: TokenText
) -> ChatLogprobs | None:
    if completion.logprobs is None:
        return None
    start = len(completion.token_ids) - len(tokens)
    return chat_logprobs(tokens, completion.logprobs[start:], body.top_logprobs or 0, texts)


def _chunk(index: int, completion: CompletionOutput, body: ChatRequest, texts: TokenText) -> ChunkChoice | None:
    logprobs = _logprobs(completion, completion.token_ids_diff, body, texts)
    if not (completion.text_diff or completion.finish_reason or (logprobs and logprobs.content)):
        return None
    return ChunkChoice(
        index=index,
        delta=Delta(content=completion.text_diff),
        logprobs=logprobs,
        finish_reason=completion.finish_reason,
        stop_reason=completion.stop_reason,
    )


def _response(answer: Answer, body: ChatRequest, texts: TokenText, outputs: list[RequestOutput]) -> ChatResponse:
    completions = [output.outputs[0] for output in outputs]
    choices = [
        ChatChoice(
            index=index,
            message=AnswerMessage(content=completion.text),
            logprobs=_logprobs(completion, completion.token_ids, body, texts),
            finish_reason=completion.finish_reason,
            stop_reason=completion.stop_reason,
        )
        for index, completion in enumerate(completions)
    ]
    counts = usage(outputs, 1)
    return ChatResponse(id=answer.id, created=answer.created, model=answer.model, choices=choices, usage=counts)


def _chat_chunk(answer: Answer, choices: list[ChunkChoice], counts: Usage | None) -> ChatChunk:
    return ChatChunk(id=answer.id, created=answer.created, model=answer.model, choices=choices, usage=counts)
