"""The routes of OpenAI's interface, and vLLM's for tokenizers."""

from __future__ import annotations

import time
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from minicache_trt.runtime.prompts import check_tokens
from minicache_trt.runtime.tokenizer import Tokenizer
from minicache_trt.serving.answering import Answering, check_model
from minicache_trt.serving.chat_models import ChatMessage, ChatRequest, ChatResponse
from minicache_trt.serving.chat_template import ChatTemplate
from minicache_trt.serving.chats import chat, messages_for_template
from minicache_trt.serving.completion_models import CompletionRequest, CompletionResponse
from minicache_trt.serving.completions import complete
from minicache_trt.serving.errors import ApiError
from minicache_trt.serving.protocol import (
    DetokenizeRequest,
    DetokenizeResponse,
    ErrorResponse,
    ModelCard,
    ModelList,
    TokenizeRequest,
    TokenizeResponse,
)
from minicache_trt.serving.token_text import TokenText

ERRORS: dict[int | str, dict[str, Any]] = {"4XX": {"model": ErrorResponse}, "5XX": {"model": ErrorResponse}}


def openai_router(answering: Answering, template: ChatTemplate) -> APIRouter:
    """``/v1`` and the tokenizer's routes."""
    router = APIRouter(responses=ERRORS)
    service = answering.service
    tokenizer = service.llm.tokenizer
    texts = TokenText(tokenizer)
    started = int(time.time())
    limits = service.llm.engine.build

    @router.get("/v1/models")
    async def models() -> ModelList:
        names = service.model_names
        return ModelList(data=[_card(name, names[0], started, limits.max_seq_len) for name in names])

    @router.get("/v1/models/{model:path}")
    async def model(model: str) -> ModelCard:
        name = check_model(model, service.model_names)
        return _card(name, service.model_names[0], started, limits.max_seq_len)

    @router.post("/v1/completions", response_model=CompletionResponse)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        return await complete(answering, texts, request, body)

    @router.post("/v1/chat/completions", response_model=ChatResponse)
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        return await chat(answering, template, texts, request, body)

    @router.post("/tokenize")
    def tokenize(body: TokenizeRequest) -> TokenizeResponse:
        check_model(body.model, service.model_names)
        tokens = _tokens(body, _needed(tokenizer), template)
        strings = [texts.text_of(token) for token in tokens] if body.return_token_strs else None
        return TokenizeResponse(count=len(tokens), max_model_len=limits.max_seq_len, tokens=tokens, token_strs=strings)

    @router.post("/detokenize")
    def detokenize(body: DetokenizeRequest) -> DetokenizeResponse:
        check_model(body.model, service.model_names)
        if body.tokens:
            check_tokens(body.tokens, "tokens", service.llm.engine.model.vocab_size, max(1, len(body.tokens)))
        text = _needed(tokenizer).decode(body.tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return DetokenizeResponse(prompt=text)

    return router


def _card(name: str, root: str, created: int, max_seq_len: int) -> ModelCard:
    return ModelCard(id=name, created=created, root=root, max_model_len=max_seq_len)


def _needed(tokenizer: Tokenizer | None) -> Any:
    if tokenizer is None:
        raise ApiError(400, "this model has no tokenizer; send token ids to /v1/completions")
    return tokenizer


def _tokens(body: TokenizeRequest, tokenizer: Any, template: ChatTemplate) -> list[int]:
    if (body.prompt is None) == (body.messages is None):
        raise ApiError(400, "prompt: expected either prompt or messages", param="prompt")
    if body.messages is not None:
        try:
            messages = [ChatMessage.model_validate(message) for message in body.messages]
        except ValueError as error:
            raise ApiError(400, "messages: expected objects with role and content", param="messages") from error
        return template.token_ids(messages_for_template(messages), body.add_generation_prompt)
    try:
        return list(tokenizer.encode(body.prompt, add_special_tokens=body.add_special_tokens))
    except (TypeError, ValueError) as error:
        raise ApiError(400, "prompt: expected valid Unicode", param="prompt") from error
