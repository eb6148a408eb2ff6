"""``generate`` of transformers, timed by what its streamer sees.

Run as a module, it is a worker of `minicache_trt.benchmark.peers`.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from transformers import AutoModelForCausalLM, __version__
from transformers.generation.streamers import BaseStreamer

from minicache_trt.benchmark.timings import Timings, alternate
from minicache_trt.cli.console import quiet_transformers
from minicache_trt.hf_config import has_softcaps, load_config

ATTENTIONS = ("sdpa", "eager")


class Stamps(BaseStreamer):
    """Time of every token `generate` reports; the first report is the prompt."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: object) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


class HuggingFace:
    """``generate`` in float32, greedy, with the dynamic cache it uses by default.

    Parameters
    ----------
    checkpoint : str
        Hugging Face checkpoint directory.
    attention : str
        One of ``ATTENTIONS``.
    """

    def __init__(self, checkpoint: str, attention: str) -> None:
        self.model: Any = AutoModelForCausalLM.from_pretrained(
            checkpoint, config=load_config(checkpoint), dtype=torch.float32, attn_implementation=attention
        )

    def run(self, prompts: Sequence[list[int]], new_tokens: int) -> Timings:
        """Prefill ``prompts``, all of one length, and generate ``new_tokens`` after each."""
        stamps, ids = Stamps(), torch.tensor(prompts)
        start = time.perf_counter()
        output = self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            min_new_tokens=new_tokens,
            max_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=0,
            streamer=stamps,
        )
        tokens = tuple(map(tuple, output[:, ids.shape[1] :].tolist()))
        return Timings.from_stamps(start, stamps.times[1:], len(prompts), tokens)


def faster_attention(
    checkpoint: str, prompts: Sequence[list[int]], new_tokens: int = 16, rounds: int = 3
) -> tuple[HuggingFace, dict[str, float]]:
    """The model with the attention that completes ``prompts`` faster, and the new tokens per second of each.

    The whole run counts: of a long prompt, prefill is what tells attentions apart.
    """
    names = ["eager"] if has_softcaps(load_config(checkpoint)) else ATTENTIONS
    models = {name: HuggingFace(checkpoint, name) for name in names}
    for model in models.values():
        model.run(prompts, 4)
    samples = alternate({name: partial(model.run, prompts, new_tokens) for name, model in models.items()}, rounds)
    speeds = {
        name: statistics.median(new_tokens / _seconds(timings) for timings in runs) for name, runs in samples.items()
    }
    return models[max(speeds, key=lambda name: speeds[name])], speeds


def _seconds(timings: Timings) -> float:
    return max(timings.first_tokens) + sum(timings.steps)


def main(checkpoint: str, threads: str, context: str) -> None:
    """Answer requests, a line of JSON each; the first line says who answers."""
    quiet_transformers()
    if int(threads):
        torch.set_num_threads(int(threads))
    vocabulary = load_config(checkpoint).get_text_config().vocab_size
    prompt = torch.randint(vocabulary, (int(context),), generator=torch.Generator().manual_seed(0)).tolist()
    model, speeds = faster_attention(checkpoint, [prompt])
    settings = {"attention": model.model.config._attn_implementation, "attention_probe": speeds}
    print(json.dumps({"name": "transformers", "version": __version__, "settings": settings}), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps(asdict(model.run(request["prompts"], request["new_tokens"]))), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
