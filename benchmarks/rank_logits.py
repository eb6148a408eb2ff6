"""How long does a step's array of logits take from a rank's process to the engine's?

By the connection, pickled, and by shared memory, in turn; what is timed is from the engine's call to the array in its
hands. The array is there before the call, so nothing is computed.
"""

from __future__ import annotations

import multiprocessing
import statistics
import sys
import time
from multiprocessing.connection import Connection
from typing import Annotated, Any

import numpy as np
import typer
from common import REPOSITORY, alternate, run
from reporting import JsonFile, write_report

sys.path.insert(0, str(REPOSITORY))
from minicache_trt.errors import UserError
from minicache_trt.parallel.messages import Reply
from minicache_trt.parallel.shared_array import SharedArray, Written

SHAPES = ((1, 32000), (8, 32000), (1, 128256), (64, 128256))


def main(
    rounds: Annotated[int, typer.Option(help="Of both ways in turn.")] = 9,
    calls: Annotated[int, typer.Option(help="In a round.")] = 20,
    json_file: JsonFile = None,
) -> None:
    """Milliseconds of both ways, for several batches and vocabularies."""
    shared = SharedArray.create()
    if shared is None:
        raise UserError("this system has no memfd_create")
    rows, data = [], []
    for shape in SHAPES:
        here, there = multiprocessing.Pipe()
        rank = multiprocessing.get_context("fork").Process(target=answer, args=(there, shared.fd, shape), daemon=True)
        rank.start()
        here.recv()

        def seconds(way: str, connection: Connection = here) -> float:
            start = time.perf_counter()
            for _ in range(calls):
                connection.send(way)
                value = connection.recv().value
                array = shared.read(value) if isinstance(value, Written) else value
                assert array[0, 0] == 1.0
            return (time.perf_counter() - start) / calls

        times = alternate({way: lambda way=way: seconds(way) for way in ("pipe", "shared")}, rounds)
        here.send("end")
        rank.join()
        ratios = [a / b for a, b in zip(times["pipe"], times["shared"], strict=True)]
        medians = {way: 1000 * statistics.median(values) for way, values in times.items()}
        data.append({"shape": shape, "milliseconds": medians, "ratio": statistics.median(ratios)})
        texts = [f"{medians[way]:.2f}" for way in ("pipe", "shared")]
        rows.append((str(list(shape)), *texts, f"{statistics.median(ratios):.1f}x"))
    columns = ("shape", "pipe, ms", "shared memory, ms", "ratio")
    write_report("Logits of a step", columns, rows, {"rows": data}, json_file)


def answer(connection: Connection, fd: int, shape: tuple[int, int]) -> None:
    """The rank's side."""
    shared, logits = SharedArray(fd), np.ones(shape, np.float32)
    connection.send("ready")
    while (way := connection.recv()) != "end":
        value: Any = logits if way == "pipe" else shared.write(logits)
        connection.send(Reply(value))


if __name__ == "__main__":
    run(main)
