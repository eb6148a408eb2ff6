"""Write a plan that stores neighbouring layers together: the joint Karhunen-Loeve transform of their keys and values.

    python examples/joint_klt.py CHECKPOINT TEXT plan.json --rank 64 --format int4
    minicache-trt build --model CHECKPOINT --plan plan.json --output engine

Keys are taken before RoPE, where neighbouring layers have more in common. For each pair of layers and KV head, the
eigenvectors of the joint covariance with the largest eigenvalues become the stream's `encode`; what they leave out is
lost. TEXT is plain text, or documents separated by a newline and a NUL.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from transformers import AutoModelForCausalLM, AutoTokenizer

from minicache_trt.checkpoint import resolve_config
from minicache_trt.compression.plan import CompressionPlan
from minicache_trt.compression.plan_json import save_plan
from minicache_trt.compression.segment import Segment
from minicache_trt.compression.stream import Stream
from minicache_trt.config import ModelConfig

PROJECTIONS = {"key": "k_proj", "value": "v_proj"}


def key_value_states(checkpoint: Path, config: ModelConfig, text: str, tokens: int) -> dict[str, torch.Tensor]:
    """Keys before RoPE and values of a text: ``[num_layers, tokens, num_kv_heads, head_dim]`` each."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    seen: dict[str, list[list[torch.Tensor]]] = {part: [[] for _ in range(config.num_layers)] for part in PROJECTIONS}
    for index, layer in enumerate(model.model.layers):
        for part, name in PROJECTIONS.items():
            store = seen[part][index].append
            getattr(layer.self_attn, name).register_forward_hook(lambda _, __, out, store=store: store(out[0]))
    ids = tokenizer(text.replace("\n\0", "\n"), return_tensors="pt").input_ids[:, :tokens]
    with torch.no_grad():
        for chunk in ids.split(min(512, config.max_position_embeddings), dim=1):
            model(chunk, use_cache=False)
    shape = (config.num_layers, -1, config.num_kv_heads, config.head_dim)
    return {part: torch.stack([torch.cat(rows) for rows in layers]).view(shape) for part, layers in seen.items()}


def joint_klt(states: torch.Tensor, rank: int) -> dict[str, np.ndarray]:
    """Matrices of a linear stream for the states ``[m, tokens, H, D]`` of its layers."""
    joined = states.permute(2, 1, 0, 3).flatten(2).double()
    mean = joined.mean(1)
    centred = joined - mean[:, None]
    values, vectors = torch.linalg.eigh(centred.transpose(1, 2) @ centred / joined.shape[1])
    encode, sigma = vectors.flip(-1)[..., :rank], values.flip(-1)[..., :rank].clamp_min(1e-12).sqrt()
    matrices = {"encode": encode, "decode": encode.transpose(1, 2), "mean": mean, "sigma": sigma}
    return {name: matrix.float().contiguous().numpy() for name, matrix in matrices.items()}


def main(
    checkpoint: Path,
    text: Path,
    output: Path,
    rank: Annotated[int, typer.Option(help="Components kept of the two layers' 2 x head_dim.")] = 64,
    format: Annotated[str, typer.Option(help="Their storage: int8, int4, g4, g3, g2, ...")] = "int4",
    tokens: Annotated[int, typer.Option(help="Tokens of the text to calibrate on.")] = 16384,
) -> None:
    """Calibrate pairs of layers and write the plan with its matrices."""
    config = resolve_config(str(checkpoint))
    states = key_value_states(checkpoint, config, text.read_text(encoding="utf-8"), tokens)
    streams, matrices = [], {}
    for start in range(0, config.num_layers, 2):
        layers = tuple(range(start, min(start + 2, config.num_layers)))
        segment = Segment(min(rank, len(layers) * config.head_dim), format, transform="hadamard")
        for part in PROJECTIONS:
            basis = "pre_rope" if part == "key" else "post_rope"
            stream = Stream(part, layers, (segment,), merge="linear", basis=basis)
            own = joint_klt(states[part][list(layers)], stream.rank)
            if not stream.gaussian:
                own.pop("sigma")
            matrices |= {f"streams.{len(streams)}.{name}": matrix for name, matrix in own.items()}
            streams.append(stream)
    plan = CompressionPlan(f"klt-{format}x{rank}", tuple(streams))
    save_plan(replace(plan, matrices=matrices).validate(config), output)


if __name__ == "__main__":
    typer.run(main)
