"""How many requests may be under way at once."""

from __future__ import annotations

import threading

from minicache_trt.serving.errors import ApiError, draining


class Admission:
    """Counts sequences from their admission to their end. Any thread may call it.

    Parameters
    ----------
    max_batch_size : int
        Sequences the engine runs at once.
    max_queue_size : int
        Sequences that may wait beside them.
    """

    def __init__(self, max_batch_size: int, max_queue_size: int) -> None:
        self.capacity = max_batch_size + max_queue_size
        self._changed = threading.Condition()
        self._in_flight = 0
        self._draining = False

    @property
    def in_flight(self) -> int:
        """Sequences admitted and not ended."""
        return self._in_flight

    @property
    def draining(self) -> bool:
        return self._draining

    @property
    def idle(self) -> bool:
        return self._in_flight == 0

    def acquire(self, count: int) -> None:
        """Admit ``count`` sequences, all or none.

        Raises
        ------
        ApiError
            400 when there will never be room for so many, 429 when there is none now, 503 while draining.
        """
        with self._changed:
            if self._draining:
                raise draining()
            if count > self.capacity:
                raise ApiError(
                    400, f"the request asks for {count} sequences, this server takes {self.capacity} at a time"
                )
            if self._in_flight + count > self.capacity:
                raise ApiError(
                    429,
                    f"the queue is full: {self._in_flight} of {self.capacity} sequences are under way; try again later",
                    "rate_limit_error",
                    "queue_full",
                    retry_after=1,
                )
            self._in_flight += count

    def release(self, count: int = 1) -> None:
        """So many sequences have ended."""
        with self._changed:
            self._in_flight -= count
            self._changed.notify_all()

    def drain(self) -> None:
        """Admit nothing any more."""
        with self._changed:
            self._draining = True
            self._changed.notify_all()

    def wait_until_idle(self, timeout: float | None) -> bool:
        """Wait until nothing is under way, at most ``timeout`` seconds; whether that came."""
        with self._changed:
            return self._changed.wait_for(lambda: self._in_flight == 0, timeout)

    def wait_until_idle_or_draining(self) -> None:
        """Wait until nothing is under way, or `drain` has been called."""
        with self._changed:
            self._changed.wait_for(lambda: self._draining or self._in_flight == 0)
