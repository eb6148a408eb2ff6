"""Sizes in bytes, as people write them."""

from __future__ import annotations

import re

from minicache_trt.errors import UserError


def format_bytes(count: float) -> str:
    """``1536`` as ``1.5 KiB``."""
    if abs(count) < 1024:
        return f"{count:.0f} bytes"
    for unit in ("KiB", "MiB", "GiB"):
        count /= 1024
        if abs(count) < 1024:
            return f"{count:.1f} {unit}"
    return f"{count / 1024:.1f} TiB"


def parse_bytes(text: str, flag: str) -> int:
    """``512MiB``, ``2GB``, ``1.5g`` or a plain number, in bytes; ``flag`` names the option in errors."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?\s*", text.lower())
    if not match:
        raise UserError(f"{flag}: expected a size such as 512MiB, 2GB or 1000000, got {text!r}")
    number, prefix, binary = match.groups()
    return int(float(number) * (1024 if binary else 1000) ** " kmgt".index(prefix or " "))
