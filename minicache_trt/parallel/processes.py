"""The processes of an engine's ranks: started together, called together, ended together."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Sequence
from multiprocessing.connection import Connection, Listener, wait
from pathlib import Path
from typing import Any

from minicache_trt.backends.base import EngineLost
from minicache_trt.errors import UserError
from minicache_trt.parallel.messages import Call, Reply, Start
from minicache_trt.parallel.shared_array import SharedArray, Written

_ACCEPT_SECONDS = 60.0
_GRACE_SECONDS = 10.0
"""How long the other ranks have to answer once one has failed; they may be waiting for it forever."""

_END_SECONDS = 10.0
"""How long idle ranks have to end."""

_GONE = "its process ended"


class RankProcesses:
    """``size`` processes that answer the same calls.

    Parameters
    ----------
    directory : Path
        The engine.
    backend : str
    num_threads : int, optional
        Of each rank.
    size : int

    Raises
    ------
    UserError
        A rank cannot load its share.
    """

    def __init__(self, directory: Path, backend: str, num_threads: int | None, size: int) -> None:
        self._lock = threading.Lock()
        self._folder = tempfile.TemporaryDirectory(prefix="minicache-trt-ranks-")
        self._processes: list[subprocess.Popen[bytes]] = []
        self._connections: list[Connection] = []
        self._ended: str | None = None
        self._shared = SharedArray.create()
        self._finalizer = weakref.finalize(self, _end, self._processes, self._connections, self._folder, self._shared)
        folder, key = Path(self._folder.name), secrets.token_bytes(32)
        with Listener(str(folder / "engine"), authkey=key) as listener:
            for rank in range(size):
                self._processes.append(_start(folder / "engine", key, rank, self._shared if rank == 0 else None))
            self._accept(listener, size)
        for rank, connection in enumerate(self._connections):
            connection.send(Start(directory.absolute(), backend, num_threads, rank, size, folder / "rendezvous"))
        try:
            self._collect()
        except BaseException:
            self.close()
            raise

    @property
    def processes(self) -> tuple[subprocess.Popen[bytes], ...]:
        """In the order of ranks."""
        return tuple(self._processes)

    def call(self, method: str, *arguments: Any) -> list[Any]:
        """Call a method of every rank's engine; results in the order of ranks.

        Raises
        ------
        UserError
            What a rank raised for its user; it lives on.
        EngineLost
            A rank failed otherwise or is gone. All have ended then, and every later call says so.
        """
        with self._lock:
            if self._ended is not None:
                raise EngineLost(self._ended)
            try:
                for connection in self._connections:
                    connection.send(Call(method, arguments))
            except OSError:
                pass  # `_collect` finds out which rank is gone
            return self._collect()

    @property
    def failure(self) -> str | None:
        """Why the ranks have ended without `close`, or are about to: a process that died is noticed without a call."""
        if self._ended is None and self._finalizer.alive:
            gone = [rank for rank, process in enumerate(self._processes) if process.poll() is not None]
            return _ended("; ".join(f"rank {rank}: {_GONE}" for rank in gone)) if gone else None
        return self._ended

    def close(self) -> None:
        """End all ranks."""
        self._finalizer()

    def _accept(self, listener: Listener, size: int) -> None:
        def accept() -> None:
            connections = (listener.accept() for _ in range(size))
            self._connections += [connection for _, connection in sorted((c.recv(), c) for c in connections)]

        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        waited = 0.0
        while thread.is_alive():
            thread.join(0.1)
            waited += 0.1
            if waited > _ACCEPT_SECONDS or any(process.poll() is not None for process in self._processes):
                self.close()
                raise UserError(
                    f"{size} processes for the engine's ranks could not be started",
                    "check the machine's memory and number of processes",
                )

    def _collect(self) -> list[Any]:
        replies: dict[int, Reply] = {}
        open_ranks = dict(enumerate(self._connections))
        seconds = None
        while open_ranks:
            ready = wait(list(open_ranks.values()), seconds)
            if not ready:
                break
            for rank, connection in tuple(open_ranks.items()):
                if connection in ready:
                    replies[rank] = _receive(connection)
                    del open_ranks[rank]
            if any(reply.user_error or reply.failure for reply in replies.values()):
                seconds = _GRACE_SECONDS
        return self._results(replies, list(open_ranks))

    def _results(self, replies: dict[int, Reply], silent: Sequence[int]) -> list[Any]:
        gone = [rank for rank, reply in sorted(replies.items()) if reply.failure == _GONE]
        # Those that are gone made the others fail.
        failed = gone or [rank for rank, reply in sorted(replies.items()) if reply.failure]
        failures = [f"rank {rank}: {replies[rank].failure}" for rank in failed]
        if failures or silent:
            refused = [reply for reply in replies.values() if reply.user_error]
            self._ended = _ended("; ".join(failures) or "one refused its part")
            for process in self._processes:
                process.kill()  # some may wait for another forever
            self.close()
            if refused and not failures:
                refused[0].result(0)
            raise EngineLost(self._ended)
        return [self._value(replies[rank].result(rank)) for rank in sorted(replies)]

    def _value(self, result: Any) -> Any:
        return self._shared.read(result) if self._shared is not None and isinstance(result, Written) else result


def _ended(reason: str) -> str:
    return f"the engine's ranks have ended ({reason})"


def _interpreter() -> str:
    """A Python like this one; where Python is embedded, as in Triton's stub, ``sys.executable`` is something else."""
    if Path(sys.executable or "").name.startswith("python"):
        return sys.executable
    return str(Path(sys.exec_prefix) / "bin" / f"python{sys.version_info.major}.{sys.version_info.minor}")


def _start(address: Path, key: bytes, rank: int, shared: SharedArray | None) -> subprocess.Popen[bytes]:
    command = [_interpreter(), "-m", "minicache_trt.parallel.worker", str(address), str(rank)]
    inherited = () if shared is None else (shared.fd,)
    command += map(str, inherited)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    process = subprocess.Popen(command, stdin=subprocess.PIPE, env=environment, pass_fds=inherited)
    assert process.stdin is not None
    process.stdin.write(key.hex().encode() + b"\n")
    process.stdin.close()
    return process


def _receive(connection: Connection) -> Reply:
    try:
        reply: Reply = connection.recv()
    except (EOFError, OSError):
        return Reply(failure=_GONE)
    return reply


def _end(
    processes: list[subprocess.Popen[bytes]],
    connections: list[Connection],
    folder: tempfile.TemporaryDirectory[str],
    shared: SharedArray | None,
) -> None:
    """Ranks that are idle end when their connection does; those that wait for one that is gone are killed."""
    for connection in connections:
        connection.close()
    deadline = time.monotonic() + _END_SECONDS
    for process in processes:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    if shared is not None:
        os.close(shared.fd)
    folder.cleanup()
