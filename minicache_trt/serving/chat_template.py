"""From a conversation to the tokens of a prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from minicache_trt.errors import UserError
from minicache_trt.runtime.tokenizer import Tokenizer
from minicache_trt.serving.errors import ApiError


class ChatTemplate:
    """The tokenizer's chat template, or another one in its place.

    Parameters
    ----------
    tokenizer : Tokenizer, optional
        A Hugging Face tokenizer renders templates.
    template : str, optional
        A Jinja template to use instead of the tokenizer's own.
    """

    def __init__(self, tokenizer: Tokenizer | None, template: str | None = None) -> None:
        self._tokenizer: Any = tokenizer
        self._template = template

    @property
    def available(self) -> bool:
        """Whether conversations can be rendered."""
        own = getattr(self._tokenizer, "chat_template", None)
        return self._tokenizer is not None and bool(self._template or own)

    def token_ids(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Tokens of a conversation; the template writes special tokens itself.

        Raises
        ------
        ApiError
            When there is no template, or it refuses the conversation.
        """
        if not self.available:
            raise ApiError(
                400,
                "messages: this model's tokenizer has no chat template; use /v1/completions, "
                "or start the server with --chat-template FILE",
                param="messages",
            )
        try:
            text = self._tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                **(variables or {}),
                chat_template=self._template,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
            )
            return list(self._tokenizer.encode(text, add_special_tokens=False))
        except Exception as error:  # whatever a template raises, it raises it about this conversation
            raise ApiError(
                400, f"messages: the chat template refuses them: {_one_line(error)}", param="messages"
            ) from error


def read_template(source: str | None) -> str | None:
    """``--chat-template``: a file's contents, or a template that is given in place.

    Raises
    ------
    UserError
        When it is neither.
    """
    if source is None:
        return None
    if "{{" in source or "{%" in source:
        return source
    try:
        return Path(source).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"--chat-template: cannot read {source}: {reason}", "give a Jinja file or template") from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
