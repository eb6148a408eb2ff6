"""A worker of `minicache_trt.benchmark.peers` that runs onnxruntime-genai.

It is run as a file by the Python of another environment: it imports nothing of this package.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import numpy as np
import onnxruntime_genai as og


def load(directory: str, threads: int) -> Any:
    """The model with its own settings but for the number of threads (0: its default)."""
    config = og.Config(directory)
    if threads:
        session = {"intra_op_num_threads": threads, "inter_op_num_threads": 1}
        config.overlay(json.dumps({"model": {"decoder": {"session_options": session}}}))
    return og.Model(config)


def run(model: Any, prompts: list[list[int]], new_tokens: int) -> dict[str, Any]:
    """Fields of `minicache_trt.benchmark.timings.Timings`.

    Appending tokens prefills; the first call of ``generate_next_token`` samples from that, each later one decodes.
    """
    batch, context = len(prompts), len(prompts[0])
    ids = np.array(prompts, np.int32)
    start = time.perf_counter()
    params = og.GeneratorParams(model)
    length = context + new_tokens
    params.set_search_options(batch_size=batch, max_length=length, min_length=length, do_sample=False)
    generator = og.Generator(model, params)
    generator.append_tokens(ids)
    stamps = []
    for _ in range(new_tokens):
        generator.generate_next_token()
        stamps.append(time.perf_counter())
    tokens = [[int(token) for token in generator.get_sequence(row)[context:]] for row in range(batch)]
    steps = [after - before for before, after in zip(stamps, stamps[1:])]  # noqa: B905, RUF007 - any Python 3
    return {"first_tokens": [stamps[0] - start] * batch, "steps": steps, "tokens": tokens}


def main(directory: str, threads: str) -> None:
    """Answer requests, a line of JSON each; the first line says who answers."""
    model = load(directory, int(threads))
    hello = {"name": "onnxruntime-genai", "version": og.__version__, "settings": {}}
    print(json.dumps(hello), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps(run(model, request["prompts"], request["new_tokens"])), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
