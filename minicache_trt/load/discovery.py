"""Before anything is measured: does the endpoint answer, what does it serve, how does it count?"""

from __future__ import annotations

import re
from typing import Any

import httpx
import numpy as np

from minicache_trt.errors import UserError
from minicache_trt.load.exchange import Endpoint, error_message
from minicache_trt.load.generator import send_all
from minicache_trt.load.record import Record
from minicache_trt.load.requests import Request
from minicache_trt.load.text import MeasuredText, random_words, tokens_per_word

PROBE_WORDS = (16, 64)
ASSUMED_TOKENS_PER_WORD = 1.3
CONNECT_SECONDS = 10.0
KEY_HINT = "give --api-key, or set OPENAI_API_KEY"


def parse_url(text: str) -> str:
    """Root of an endpoint; a final ``/v1`` or ``/v2`` is taken off.

    Raises
    ------
    UserError
        It is not an http URL.
    """
    try:
        url = httpx.URL(text)
    except httpx.InvalidURL as error:
        raise UserError(f"--url: {error}") from error
    if url.scheme not in ("http", "https") or not url.host:
        raise UserError(f"--url: expected an address such as http://127.0.0.1:8000, got {text!r}")
    return re.sub(r"(/v[12])?/*$", "", text)


async def find_model(client: httpx.AsyncClient, url: str, headers: dict[str, str]) -> str:
    """The first model an OpenAI endpoint names.

    Raises
    ------
    UserError
        Nobody answers, or names one.
    """
    response = await _get(client, f"{url}/v1/models", headers)
    if response.status_code in (401, 403):
        raise UserError(
            f"{url} refuses the key: {error_message(response.content)}", "give --api-key, or set OPENAI_API_KEY"
        )
    try:
        data: Any = response.json()
        return str(data["data"][0]["id"])
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise UserError(
            f"{url}/v1/models names no model (HTTP {response.status_code})",
            "give --model, and see whether --url is right",
        ) from error


async def check_answers(client: httpx.AsyncClient, url: str, headers: dict[str, str]) -> None:
    """Somebody listens at ``url``, whatever they say.

    Raises
    ------
    UserError
        Nobody does.
    """
    await _get(client, url, headers)


async def probe(client: httpx.AsyncClient, endpoint: Endpoint, rng: np.random.Generator) -> MeasuredText | None:
    """Send two short prompts of known numbers of words; None when the endpoint does not count their tokens.

    Raises
    ------
    UserError
        A request fails.
    """
    counts = []
    for words in PROBE_WORDS:
        (record,) = await send_all(client, endpoint, [Request(random_words(rng, words), 2)], [0.0])
        check_record(record, endpoint)
        counts.append((words, record.input_tokens))
    (short, few), (long, many) = counts
    if few is None or many is None:
        return None
    measured = tokens_per_word((short, few), (long, many))
    return None if measured is None else MeasuredText(measured)


def check_record(record: Record, endpoint: Endpoint) -> None:
    """A first request must succeed, or nothing else will.

    Raises
    ------
    UserError
        With the reason it failed.
    """
    if record.error is not None:
        refused = record.error in ("http_401", "http_403")
        hint = KEY_HINT if refused else "see --api, --model and --endpoint"
        raise UserError(f"the first request to {endpoint.target} failed: {record.error}: {record.message}", hint)


async def _get(client: httpx.AsyncClient, url: str, headers: dict[str, str]) -> httpx.Response:
    try:
        return await client.get(url, headers=headers, timeout=CONNECT_SECONDS)
    except httpx.HTTPError as error:
        reason = str(error) or type(error).__name__
        raise UserError(
            f"cannot connect to {url}: {reason}", "start the server first, and see whether --url is right"
        ) from error
