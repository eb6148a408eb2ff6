"""``/v1/completions``: request, response, chunks of a stream."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, Field

from minicache_trt.serving.protocol import SamplingFields, Usage


class CompletionRequest(SamplingFields):
    """``prompt``: text, token ids, or a list of either."""

    prompt: str | list[str] | list[int] | list[list[int]]
    echo: bool | None = None
    suffix: str | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None


class CompletionLogprobs(BaseModel):
    """Lists of one entry per token; ``text_offset`` counts characters from the beginning of the choice's text."""

    tokens: list[str] = []
    token_logprobs: list[float | None] = []
    top_logprobs: list[dict[str, float] | None] = []
    text_offset: list[int] = []


class CompletionChoice(BaseModel):
    """One completion, or what is new of it."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None


class CompletionResponse(BaseModel):
    """A response, or one chunk of a stream."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None
