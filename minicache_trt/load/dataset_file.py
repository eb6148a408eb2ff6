"""Requests in a user's file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from minicache_trt.errors import UserError
from minicache_trt.load.requests import Request
from minicache_trt.load.text import TextMaker

PROMPT_KEYS = ("prompt", "text_input", "text", "question")
OUTPUT_KEYS = ("output_len", "output_tokens", "max_tokens")
ANSWER_KEYS = ("completion", "response", "answer")


def read_requests(
    path: Path, text: TextMaker, output_len: int | None, max_input_len: int, max_output_len: int
) -> list[Request]:
    """Requests of a ShareGPT file (JSON) or of a file of prompts (JSON lines).

    A conversation gives its first turn as the prompt and its second one as the length of the answer. A line is a JSON
    string, or an object with a prompt (``prompt``, ``text_input``, ``text``, ``question``) and, optionally, a number
    of tokens (``output_len``, ``output_tokens``, ``max_tokens``) or an answer (``completion``, ``response``,
    ``answer``) that is as long as wanted.

    Parameters
    ----------
    path : Path
    text : TextMaker
        Counts tokens.
    output_len : int, optional
        Tokens wanted after every prompt, whatever the file says.
    max_input_len, max_output_len : int
        Longer prompts are left out, longer answers cut.

    Raises
    ------
    UserError
        The file cannot be read, or nothing in it can be used.
    """
    requests = []
    for place, prompt, answer in _pairs(path, _read(path)):
        if not prompt.strip() or text.count(prompt) > max_input_len:
            continue
        wanted = output_len or (answer if isinstance(answer, int) else text.count(answer) if answer else None)
        if wanted is None:
            raise UserError(f"{place} does not say how long its answer is", "give --output-len")
        requests.append(Request(prompt, min(wanted, max_output_len)))
    if not requests:
        raise UserError(f"{path}: no prompt of at most {max_input_len} tokens", "raise --max-input-len")
    return requests


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text") from error
    except OSError as error:
        raise UserError(f"--dataset-path: cannot read {path}: {error.strerror or error}") from error


def _pairs(path: Path, content: str) -> Iterator[tuple[str, str, str | int | None]]:
    """Where it is, the prompt, and the answer or its number of tokens."""
    try:
        data = json.loads(content)
    except json.JSONDecodeError:
        data = None
    if isinstance(data, list):
        for index, item in enumerate(data):
            yield from _entry(f"{path}[{index}]", item)
        return
    for number, line in enumerate(content.splitlines(), 1):
        if line.strip():
            place = f"{path}, line {number}"
            try:
                item = json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(
                    f"{place}: not JSON", "expected a ShareGPT JSON list, or one JSON value per line"
                ) from error
            yield from _entry(place, item)


def _entry(place: str, item: Any) -> Iterator[tuple[str, str, str | int | None]]:
    if isinstance(item, str):
        yield place, item, None
        return
    if not isinstance(item, dict):
        raise UserError(f"{place}: expected an object or a string, got {type(item).__name__}")
    if "conversations" in item or "conversation" in item:
        turns = item.get("conversations", item.get("conversation"))
        values = [turn.get("value") for turn in turns if isinstance(turn, dict)] if isinstance(turns, list) else []
        texts = [value for value in values if isinstance(value, str)]
        if len(texts) >= 2:
            yield place, texts[0], texts[1]
        return
    prompt = next((item[key] for key in PROMPT_KEYS if isinstance(item.get(key), str)), None)
    if prompt is None:
        raise UserError(f"{place} has no prompt", f"expected one of {', '.join(PROMPT_KEYS)}, or conversations")
    length = next((item[key] for key in OUTPUT_KEYS if key in item), None)
    if length is not None:
        if not isinstance(length, int) or isinstance(length, bool) or length < 1:
            raise UserError(f"{place}: expected a positive number of output tokens, got {length!r}")
        yield place, prompt, length
        return
    yield place, prompt, next((item[key] for key in ANSWER_KEYS if isinstance(item.get(key), str)), None)
