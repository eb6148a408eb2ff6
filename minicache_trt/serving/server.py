"""Sockets, signals, and a graceful end."""

from __future__ import annotations

import asyncio
import signal
import socket
import threading
from types import FrameType

import uvicorn
from fastapi import FastAPI

from minicache_trt.errors import UserError
from minicache_trt.serving.history import History
from minicache_trt.serving.service import Service

SAMPLE_SECONDS = 1.0
FLUSH_SECONDS = 5
"""How long finished responses may take to reach their clients at the end."""


def bind(host: str, port: int) -> socket.socket:
    """A socket on an address, before anything slow is done; port 0 takes a free one.

    Raises
    ------
    UserError
        When the address cannot be had.
    """
    remedy = "choose another with --port, or 0 for any that is free"
    try:
        infos = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = infos[0]
        made = socket.socket(family, kind, protocol)
        try:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            made.bind(address)
        except OSError:
            made.close()
            raise
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"cannot listen on {host}:{port}: {reason}", remedy) from error
    return made


class Server(uvicorn.Server):
    """Serves an application until it is told to stop, then lets running requests end.

    On the first SIGTERM or SIGINT, or `begin_drain`: nothing new is admitted, connections are still answered; requests
    that run have ``drain_timeout`` seconds, then they are aborted. A second signal ends everything at once.

    Parameters
    ----------
    app : FastAPI
    service : Service
    history : History
        Sampled once per second.
    drain_timeout : float
        Seconds.
    access_log : bool
        Print a line for every request.
    """

    def __init__(
        self, app: FastAPI, service: Service, history: History, drain_timeout: float, access_log: bool = False
    ) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                lifespan="off",
                ws="none",
                log_level="info" if access_log else "warning",
                access_log=access_log,
                server_header=False,
                timeout_graceful_shutdown=FLUSH_SECONDS,
                limit_concurrency=4 * service.admission.capacity + 256,
            )
        )
        self.ready = threading.Event()
        self.drained: bool | None = None
        self._service = service
        self._history = history
        self._drain_timeout = drain_timeout
        self._tasks: list[asyncio.Task[None]] = []
        self._loop: asyncio.AbstractEventLoop | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen; from then on `ready` is set."""
        await super().startup(sockets)
        self._loop = asyncio.get_running_loop()
        self._tasks.append(asyncio.create_task(self._sample()))
        self.ready.set()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Close what is open."""
        self._tasks[0].cancel()
        await super().shutdown(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Called by signals."""
        if self._service.admission.draining or self._loop is None:
            self.should_exit = True
            self.force_exit = sig == signal.SIGINT or self.force_exit
            threading.Thread(target=self._service.close, args=(0.0,), daemon=True).start()
        else:
            self.begin_drain()

    def begin_drain(self) -> None:
        """Stop as if by a signal; any thread may call this once the server is `ready`."""
        assert self._loop is not None
        self._service.admission.drain()
        self._loop.call_soon_threadsafe(lambda: self._tasks.append(asyncio.create_task(self._drain())))

    async def _drain(self) -> None:
        self.drained = await asyncio.to_thread(self._service.close, self._drain_timeout)
        self.should_exit = True

    async def _sample(self) -> None:
        while True:
            self._history.sample()
            await asyncio.sleep(SAMPLE_SECONDS)
