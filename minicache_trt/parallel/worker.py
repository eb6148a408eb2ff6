"""The process of one rank: ``python -m minicache_trt.parallel.worker ADDRESS RANK [FD]``, its key on standard input.

Logits go back by the shared memory whose descriptor is ``FD``; without one, by the connection.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Client, Connection
from typing import Any

import torch
import torch.distributed as dist

from minicache_trt.backends import open_backend
from minicache_trt.backends.base import Engine
from minicache_trt.config import GPU_BACKENDS
from minicache_trt.engine_directory import read_engine
from minicache_trt.errors import UserError
from minicache_trt.parallel.collectives import ProcessGroup
from minicache_trt.parallel.messages import Call, Reply, Start
from minicache_trt.parallel.rank import Rank
from minicache_trt.parallel.shard import Shard
from minicache_trt.parallel.shared_array import SharedArray


def open_rank(start: Start) -> Engine:
    """Join the process group and load this rank's share of an engine.

    Raises
    ------
    UserError
        Too few GPUs, or the backend cannot run the engine.
    """
    gpu = start.backend in GPU_BACKENDS
    if gpu:
        available = torch.cuda.device_count()
        if available < start.size:
            raise UserError(
                f"the engine has {start.size} ranks, one GPU each, and PyTorch finds {available}",
                "build it with a smaller --tp-size, or run it with --backend onnxruntime",
            )
        torch.cuda.set_device(start.rank)
    dist.init_process_group(
        "nccl" if gpu else "gloo",
        init_method=start.rendezvous.as_uri(),
        rank=start.rank,
        world_size=start.size,
    )
    info = read_engine(start.directory)
    rank = Rank(Shard.of(info.model, start.rank, start.size), ProcessGroup(start.size))
    opener: Callable[..., Engine] = open_backend(start.backend)
    return opener(start.directory, info, start.num_threads, rank)


def answer(run: Callable[[], Any]) -> Reply:
    """The reply to a call, whatever comes of it."""
    try:
        return Reply(run())
    except UserError as error:
        return Reply(user_error=(error.cause, error.remedy))
    except Exception as error:  # it belongs to the caller, in the engine's process
        return Reply(failure=f"{type(error).__name__}: {error}")


def serve(connection: Connection, shared: SharedArray | None) -> None:
    """Answer calls until the engine's process closes the connection or is gone."""
    start: Start = connection.recv()
    engines: list[Engine] = []
    reply = answer(lambda: engines.append(open_rank(start)))
    connection.send(reply)
    while engines:
        call: Call = connection.recv()
        connection.send(answer(partial(_call, engines[0], call, start.rank, shared)))


def _call(engine: Engine, call: Call, rank: int, shared: SharedArray | None) -> Any:
    result = getattr(engine, call.method)(*call.arguments)
    if call.method != "decode":
        return result
    # Every rank holds all logits; they travel once.
    if rank:
        return None
    return result if shared is None else shared.write(result)


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the engine's, which ends its ranks in order
    key = bytes.fromhex(sys.stdin.readline().strip())
    try:
        with Client(sys.argv[1], authkey=key) as connection:
            connection.send(int(sys.argv[2]))
            serve(connection, SharedArray(int(sys.argv[3])) if len(sys.argv) > 3 else None)
    except (EOFError, ConnectionError):
        pass
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
