"""The tokens of the timed ``generate`` are those of a greedy loop over the whole sequence."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from minicache_trt.benchmark.huggingface import ATTENTIONS, HuggingFace, faster_attention
from tests.support.checkpoints import DEFAULTS, LAYERED, make_checkpoint


def test_generate(tmp_path: Path) -> None:
    checkpoint = str(make_checkpoint(tmp_path / "checkpoint"))
    prompts = np.random.default_rng(0).integers(5, DEFAULTS["vocab_size"], (2, 9)).tolist()
    model, speeds = faster_attention(checkpoint, prompts[:1], new_tokens=4, rounds=1)
    assert set(speeds) == set(ATTENTIONS) and isinstance(model, HuggingFace)
    assert model.model.config._attn_implementation == max(speeds, key=lambda name: speeds[name])
    timings = model.run(prompts, 5)
    assert len(timings.first_tokens) == 2 and len(timings.steps) == 4
    ids = torch.tensor(prompts)
    with torch.no_grad():
        for _ in range(5):
            ids = torch.cat([ids, model.model(ids).logits[:, -1:].argmax(-1)], 1)
    assert timings.tokens == tuple(map(tuple, ids[:, 9:].tolist()))


def test_attention_with_soft_caps(tmp_path: Path) -> None:
    """PyTorch's own has none: it is not tried."""
    model, speeds = faster_attention(str(make_checkpoint(tmp_path / "gemma2", **LAYERED["gemma2"])), [[5, 6]], 4, 1)
    assert set(speeds) == {"eager"} and model.model.config._attn_implementation == "eager"
