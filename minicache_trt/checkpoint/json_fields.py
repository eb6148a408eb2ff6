"""Typed reading of a JSON object that people may have edited."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from minicache_trt.errors import UserError


@dataclass(frozen=True)
class JsonFields:
    """Typed reading of a JSON object; ``path`` names the file in errors."""

    values: Mapping[str, Any]
    path: str

    def get(self, key: str, kind: type, *, optional: bool = False) -> Any:
        value = self.values.get(key)
        if value is None and optional:
            return None
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind:
            raise self.error(key, kind.__name__, value)
        return value

    def error(self, key: str, expected: str, value: Any, remedy: str = "correct the file") -> UserError:
        got = "nothing" if key not in self.values else repr(value)
        return UserError(f"{self.path}: {key}: expected {expected}, got {got}", remedy)
