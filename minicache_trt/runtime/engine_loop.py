"""The thread that runs steps while requests exist."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Sequence
from queue import SimpleQueue

from minicache_trt.backends.base import EngineLost
from minicache_trt.errors import UserError
from minicache_trt.runtime.job import Job, Update
from minicache_trt.runtime.runner import Runner

Listener = Callable[[Update], None]
"""Called in the engine thread whenever a job changes, the last time when it is finished; must not wait."""


class EngineClosed(UserError):
    """The engine thread takes no more jobs: after `EngineLoop.shutdown`, or because the engine has ended by itself."""


class EngineLoop:
    """Owns a runner: jobs come and go from any thread, steps run in one.

    What other threads want is put down as commands, which the engine thread carries out between two steps. The thread
    ends when nothing is left to do and starts again with the next job. A step that raises ends the jobs of its batch
    with an error each; those that wait, and later ones, run on, unless the engine itself is lost.

    Parameters
    ----------
    runner : Runner
        Claimed for as long as this object lives.
    flush : callable
        Passes on what listeners have been told; called in the engine thread when the engine is about to compute, and
        when nothing is left to do.

    Raises
    ------
    UserError
        When somebody else has claimed the runner.

    Attributes
    ----------
    failure : str, optional
        Why the engine thread ended by itself and never starts again.
    """

    def __init__(self, runner: Runner, flush: Callable[[], None] = lambda: None) -> None:
        runner.claim()
        self._runner = runner
        self._flush = runner.before_engine = flush
        self._listeners: dict[Job, Listener] = {}  # touched by the engine thread only
        self._changed = threading.Condition()  # guards what follows
        self._commands: list[Callable[[], None]] = []
        self._thread: threading.Thread | None = None
        self._closed = False
        self.failure: str | None = None

    def submit(self, job: Job, listener: Listener) -> None:
        """Run a job.

        Raises
        ------
        EngineClosed
            After `shutdown`, or when the engine has ended by itself.
        """
        with self._changed:
            if self._closed:
                raise EngineClosed(self.failure or "the engine is shutting down and takes no more requests")
            self._commands.append(lambda: self._add(job, listener))
            if self._thread is None:
                self._thread = threading.Thread(target=self._loop, name="minicache-trt-engine", daemon=True)
                self._thread.start()

    def cancel(self, job: Job) -> None:
        """End a job soon; does nothing when it has ended before."""
        self._command(lambda: self._cancel(job))

    def run(self, jobs: Sequence[Job]) -> Generator[list[Update], None, None]:
        """Submit jobs and yield what happens to them until all have ended; closing the iterator early cancels them."""
        updates: SimpleQueue[Update] = SimpleQueue()
        pending = set(jobs)
        try:
            for job in jobs:
                self.submit(job, updates.put)
            while pending:
                update = updates.get()
                if update.finished:
                    pending.discard(update.job)
                yield [update]
        finally:
            for job in pending:
                self.cancel(job)

    def shutdown(self, drain: bool, timeout: float | None) -> bool:
        """Refuse new jobs and wait until there are none; see `LLM.shutdown`."""
        with self._changed:
            self._closed = True
            drained = drain and self._changed.wait_for(lambda: self._thread is None, timeout)
            idle = self._thread is None
        if not idle:
            self._command(lambda: self._cancel(*self._listeners))
            with self._changed:
                self._changed.wait_for(lambda: self._thread is None)
        return drained or idle

    def _command(self, command: Callable[[], None]) -> None:
        with self._changed:
            if self._thread is not None:
                self._commands.append(command)

    def _loop(self) -> None:
        try:
            while self._more():
                if self._runner.has_work:
                    self._tell(self._step())
                if not self._runner.has_work:
                    self._flush()
        except EngineLost as error:
            self._lose(str(error))
        except BaseException as error:
            self._die(f"the engine thread ended: {type(error).__name__}: {error}")
            raise

    def _more(self) -> bool:
        """Carry out commands; whether anything is left to do."""
        with self._changed:
            commands, self._commands = self._commands, []
            if not commands and not self._runner.has_work:
                self._thread = None
                self._changed.notify_all()
                return False
        for command in commands:
            command()
        return True

    def _die(self, message: str) -> None:
        """After a defect of this package: nobody may wait for a thread that is gone, or trust its cache."""
        self._close(message)
        for job in self._listeners:
            job.end("error", message)
        self._tell([Update.of(job) for job in self._listeners])
        self._flush()

    def _lose(self, message: str) -> None:
        """The engine is gone: no job can go on."""
        self._close(message)
        self._tell([self._runner.fail(job, message) for job in self._listeners])
        self._flush()

    def _close(self, message: str) -> None:
        """Refuse new jobs for good; those that were on their way are known then."""
        with self._changed:
            self._closed, self._thread, self.failure = True, None, message
            commands, self._commands = self._commands, []
            self._changed.notify_all()
        for command in commands:
            command()

    def _step(self) -> list[Update]:
        try:
            return self._runner.step()
        except EngineLost:
            raise
        except Exception as error:  # whatever it was, it belongs to these requests and to nobody else
            return self._runner.fail_running(f"{type(error).__name__}: {error}")

    def _add(self, job: Job, listener: Listener) -> None:
        self._listeners[job] = listener
        self._runner.add(job)

    def _cancel(self, *jobs: Job) -> None:
        self._tell([update for job in jobs if (update := self._runner.cancel(job)) is not None])

    def _tell(self, updates: list[Update]) -> None:
        for update in updates:
            listener = self._listeners[update.job]
            if update.finished:
                del self._listeners[update.job]
            listener(update)
