"""Waking event loops that wait for the engine thread."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

Future = asyncio.Future[None]


@dataclass
class _Pending:
    """What is due in one loop: futures, and whom to tell that nobody reads there any more."""

    futures: list[Future] = field(default_factory=list)
    gone: list[Callable[[], None]] = field(default_factory=list)


class Wakeups:
    """Futures to resolve, collected so that every event loop is woken once for a whole step.

    Waking a loop lets its thread run Python, and the engine thread wait for its turn; while the engine computes, both
    can. Only the engine thread uses this.
    """

    def __init__(self) -> None:
        self._pending: dict[asyncio.AbstractEventLoop, _Pending] = {}

    def add(self, loop: asyncio.AbstractEventLoop, future: Future, gone: Callable[[], None]) -> None:
        """Resolve ``future`` at the next `flush`; ``gone`` is called instead when the loop has been closed."""
        pending = self._pending.setdefault(loop, _Pending())
        pending.futures.append(future)
        pending.gone.append(gone)

    def flush(self) -> None:
        """Wake everybody."""
        collected, self._pending = self._pending, {}
        for loop, pending in collected.items():
            try:
                loop.call_soon_threadsafe(_wake, pending.futures)
            except RuntimeError:  # the loop has been closed
                for gone in pending.gone:
                    gone()


def _wake(futures: list[Future]) -> None:
    for future in futures:
        if not future.done():
            future.set_result(None)
