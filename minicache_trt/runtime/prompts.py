"""The shapes in which prompts may be given, and their checks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from minicache_trt.errors import UserError
from minicache_trt.runtime.tokenizer import Tokenizer

PromptLike = str | list[int] | Mapping[str, Any]
"""Text, token ids, or a dict with ``prompt`` or ``prompt_token_ids`` and, optionally, ``cache_salt``."""


@dataclass(frozen=True)
class Prompt:
    """Token ids, the text they came from if there was one, and with whom its cached prefixes are shared."""

    text: str | None
    token_ids: list[int]
    cache_salt: str | None = None


def parse_prompts(
    prompts: PromptLike | Sequence[PromptLike], tokenizer: Tokenizer | None, vocab_size: int, max_seq_len: int
) -> list[Prompt]:
    """Turn one prompt, or a list of them, into checked token ids.

    Raises
    ------
    UserError
        Naming the prompt that has the wrong type, is empty, too long, has ids outside the vocabulary, or is text
        although there is no tokenizer.
    """
    items: list[Any]
    if isinstance(prompts, str | Mapping) or (prompts and all(_is_id(item) for item in prompts)):
        items = [prompts]
    else:
        items = list(prompts)
    parsed = [_parse(item, f"prompts[{i}]", tokenizer) for i, item in enumerate(items)]
    for index, prompt in enumerate(parsed):
        check_tokens(prompt.token_ids, f"prompts[{index}]", vocab_size, max_seq_len)
    return parsed


def check_tokens(token_ids: list[int], name: str, vocab_size: int, max_seq_len: int) -> None:
    """Refuse token ids the engine cannot run.

    Raises
    ------
    UserError
        Naming the count or the id that is out of range.
    """
    if not token_ids:
        raise UserError(f"{name}: expected at least one token, got none")
    if len(token_ids) > max_seq_len:
        raise UserError(
            f"{name} has {len(token_ids)} tokens, the engine was built for max_seq_len {max_seq_len}",
            "shorten the prompt, or build the engine with a larger max_seq_len",
        )
    outside = [token for token in token_ids if not 0 <= token < vocab_size]
    if outside:
        raise UserError(f"{name}: expected token ids from 0 to {vocab_size - 1}, got {outside[0]}")


def _is_id(item: object) -> bool:
    return isinstance(item, int) and not isinstance(item, bool)


def _parse(item: object, name: str, tokenizer: Tokenizer | None) -> Prompt:
    cache_salt = None
    if isinstance(item, Mapping):
        keys = [key for key in item if key != "cache_salt"]
        if keys not in (["prompt"], ["prompt_token_ids"]):
            raise UserError(f"{name}: expected one key, prompt or prompt_token_ids, got {sorted(map(str, item))}")
        cache_salt = item.get("cache_salt")
        if cache_salt is not None and not (isinstance(cache_salt, str) and cache_salt):
            raise UserError(f"{name}: cache_salt: expected text that is not empty, got {cache_salt!r}")
        item = item[keys[0]]
    if isinstance(item, str):
        if tokenizer is None:
            raise UserError(
                f"{name} is text, but there is no tokenizer",
                "give prompts as lists of token ids, or pass tokenizer=",
            )
        if any("\ud800" <= character <= "\udfff" for character in item):
            raise UserError(f"{name}: expected valid Unicode, got {item[:40]!a}")
        return Prompt(item, list(tokenizer.encode(item)), cache_salt)
    if isinstance(item, Sequence) and all(_is_id(token) for token in item):
        return Prompt(None, list(item), cache_salt)
    raise UserError(f"{name}: expected text or a list of token ids, got {type(item).__name__}")
