"""Log-probabilities in the forms of both APIs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from minicache_trt.runtime.request import Logprob
from minicache_trt.serving.chat_models import ChatLogprobs, ChosenLogprob, TokenLogprob
from minicache_trt.serving.completion_models import CompletionLogprobs
from minicache_trt.serving.token_text import TokenText

Entries = Sequence[Mapping[int, Logprob] | None]
"""For each token: token id to `Logprob`, best first, the chosen one last if it is not among the best; or None."""


def chat_logprobs(token_ids: Sequence[int], entries: Entries, count: int, texts: TokenText) -> ChatLogprobs:
    """``count`` of the most likely tokens with each chosen one."""

    def one(token: int, logprob: float) -> TokenLogprob:
        return TokenLogprob(token=texts.text_of(token), logprob=logprob, bytes=list(texts.bytes_of(token)))

    content = []
    for token, entry in zip(token_ids, entries, strict=True):
        if entry is not None:
            top = [one(other, value.logprob) for other, value in list(entry.items())[:count]]
            chosen = one(token, entry[token].logprob)
            content.append(ChosenLogprob(**chosen.model_dump(), top_logprobs=top))
    return ChatLogprobs(content=content)


def completion_logprobs(
    token_ids: Sequence[int], entries: Entries, count: int, texts: TokenText, offset: int
) -> CompletionLogprobs:
    """The legacy form: ``count`` most likely tokens, and the chosen one, by their text.

    Parameters
    ----------
    offset : int
        Characters before the first of these tokens in the text of the choice.
    """
    result = CompletionLogprobs()
    for token, entry in zip(token_ids, entries, strict=True):
        text = texts.text_of(token)
        result.tokens.append(text)
        result.text_offset.append(offset)
        offset += len(text)
        result.token_logprobs.append(None if entry is None else entry[token].logprob)
        result.top_logprobs.append(None if entry is None else _by_text(entry, token, count, texts))
    return result


def _by_text(entry: Mapping[int, Logprob], token: int, count: int, texts: TokenText) -> dict[str, float]:
    shown = [*list(entry)[:count], token] if count else []
    return {texts.text_of(other): entry[other].logprob for other in reversed(shown)}
