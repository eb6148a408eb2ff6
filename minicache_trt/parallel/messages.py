"""What an engine and its ranks say to each other over a connection of `multiprocessing`, pickled.

    engine -> rank     a `Call`, to every rank alike
    rank -> engine     its number; then a `Reply` for each message, in order; the first one when it is ready

The connection is a Unix socket in a folder of the engine's own and is authenticated with a random key.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minicache_trt.errors import UserError


@dataclass(frozen=True)
class Start:
    """What a rank is told first."""

    directory: Path
    backend: str
    num_threads: int | None
    rank: int
    size: int
    rendezvous: Path


@dataclass(frozen=True)
class Call:
    """A method of `minicache_trt.backends.base.Engine` with its arguments."""

    method: str
    arguments: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Reply:
    """A result, or what went wrong: the lines for the person concerned, or any other exception's text."""

    value: Any = None
    user_error: tuple[str, str] | None = None
    failure: str | None = None

    def result(self, rank: int) -> Any:
        """The value.

        Raises
        ------
        UserError, RuntimeError
            What the rank raised.
        """
        if self.user_error is not None:
            raise UserError(*self.user_error)
        if self.failure is not None:
            raise RuntimeError(f"rank {rank}: {self.failure}")
        return self.value
