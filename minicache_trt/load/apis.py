"""The protocols an endpoint may speak: what is posted, and what a piece of the stream means."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from minicache_trt.load.requests import Request


@dataclass(frozen=True)
class Piece:
    """One event of a stream.

    Parameters
    ----------
    text : str
        Generated text; may be empty.
    input_tokens, output_tokens : int, optional
        The endpoint's counts, when the event has them.
    error : str, optional
        What the endpoint says went wrong.
    """

    text: str = ""
    input_tokens: int | None = None
    output_tokens: int | None = None
    error: str | None = None


@dataclass(frozen=True)
class Sampling:
    """What every request asks for besides its length.

    Parameters
    ----------
    temperature : float
    ignore_eos : bool
        Go on to the wanted length; an extension most servers know.
    seed : int, optional
        Of the endpoint's sampling.
    extra : mapping
        Further fields of the body; they replace ours.
    """

    temperature: float = 0.0
    ignore_eos: bool = False
    seed: int | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)


class Api(Protocol):
    """A protocol of streamed generation over HTTP and server-sent events."""

    name: str
    ends_with_done: bool
    """Whether a complete stream says ``[DONE]``; otherwise its end is the end of the response."""

    def path(self, model: str) -> str:
        """Where requests are posted, relative to the endpoint's root."""
        ...

    def body(self, model: str, request: Request, sampling: Sampling) -> dict[str, Any]:
        """The JSON to post."""
        ...

    def piece(self, event: Any) -> Piece:
        """What a decoded event says.

        Raises
        ------
        ValueError, KeyError, TypeError, AttributeError
            When it is not one of this protocol's.
        """
        ...


class OpenAiCompletions:
    """``/v1/completions``."""

    name, ends_with_done = "openai", True

    def path(self, model: str) -> str:
        return "/v1/completions"

    def body(self, model: str, request: Request, sampling: Sampling) -> dict[str, Any]:
        return {"model": model, "prompt": request.prompt, **_openai_fields(request, sampling)}

    def piece(self, event: Any) -> Piece:
        return _openai_piece(event, lambda choice: choice.get("text"))


class OpenAiChat:
    """``/v1/chat/completions``: the prompt is one message of the user."""

    name, ends_with_done = "openai-chat", True

    def path(self, model: str) -> str:
        return "/v1/chat/completions"

    def body(self, model: str, request: Request, sampling: Sampling) -> dict[str, Any]:
        messages = [{"role": "user", "content": request.prompt}]
        return {"model": model, "messages": messages, **_openai_fields(request, sampling)}

    def piece(self, event: Any) -> Piece:
        return _openai_piece(event, _delta_text)


class TritonGenerate:
    """Triton's ``generate_stream`` with the tensors of TensorRT-LLM's ensemble."""

    name, ends_with_done = "triton", False

    def path(self, model: str) -> str:
        return f"/v2/models/{model}/generate_stream"

    def body(self, model: str, request: Request, sampling: Sampling) -> dict[str, Any]:
        body: dict[str, Any] = {
            "text_input": request.prompt,
            "max_tokens": request.output_len,
            "stream": True,
            "temperature": sampling.temperature,
        }
        if sampling.ignore_eos:
            body["ignore_eos"] = True
        if sampling.seed is not None:
            body["random_seed"] = sampling.seed
        return {**body, **sampling.extra}

    def piece(self, event: Any) -> Piece:
        if "error" in event:
            return Piece(error=str(event["error"]))
        text = event["text_output"]
        return Piece("".join(text) if isinstance(text, list) else str(text))


APIS: dict[str, Api] = {api.name: api for api in (OpenAiCompletions(), OpenAiChat(), TritonGenerate())}


def _openai_fields(request: Request, sampling: Sampling) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "max_tokens": request.output_len,
        "temperature": sampling.temperature,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if sampling.ignore_eos:
        fields["ignore_eos"] = True
    if sampling.seed is not None:
        fields["seed"] = sampling.seed
    return {**fields, **sampling.extra}


def _openai_piece(event: Any, text: Any) -> Piece:
    if event.get("error"):
        error = event["error"]
        return Piece(error=str(error.get("message", error)) if isinstance(error, dict) else str(error))
    usage = event.get("usage") or {}
    choices = event.get("choices") or []
    return Piece(
        "".join(text(choice) or "" for choice in choices), usage.get("prompt_tokens"), usage.get("completion_tokens")
    )


def _delta_text(choice: dict[str, Any]) -> str:
    delta = choice.get("delta") or {}
    return str(delta.get("reasoning_content") or "") + str(delta.get("content") or "")
