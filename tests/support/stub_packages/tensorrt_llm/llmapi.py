"""Configuration of the stand-in."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class KvCacheConfig:
    """Of the real one, the field that is used."""

    enable_block_reuse: bool = True
