"""Which of several replicas has seen the beginning of a request."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping

KEY_CHARACTERS = 256
"""Of the beginning of a prompt: about as many tokens as a block has."""


def prefix_key(body: bytes) -> str:
    """What requests with equal beginnings have in common; empty when a body has no prompt.

    The first `KEY_CHARACTERS` of the prompt, or of the first messages of a chat, with the tenant's salt.
    """
    try:
        fields = json.loads(body)
        prompt = fields.get("prompt", fields.get("messages"))
        salt = fields.get("cache_salt")
    except (ValueError, AttributeError):
        return ""
    if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int | Mapping):
        prompt = prompt[0]  # several prompts: the first decides
    text = prompt if isinstance(prompt, str) else json.dumps(prompt)
    return json.dumps([salt, text[:KEY_CHARACTERS]]) if prompt else ""


def preferred(key: str, names: Iterable[str]) -> str:
    """Rendezvous hashing: when a name goes, only its keys move; when one comes, it takes its share of every other's."""
    return max(names, key=lambda name: hashlib.blake2b(f"{key}\0{name}".encode(), digest_size=8).digest())
