"""AWQ and GPTQ checkpoints of small Hugging Face checkpoints, packed word by word, and the floats they stand for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which output is at each place of a word."""


def write_int4(
    source: Path,
    directory: Path,
    method: str,
    group: int = 32,
    symmetric: bool = False,
    v2: bool = False,
    order: bool = False,
    **changes: Any,
) -> dict[str, Tensor]:
    """Quantize every linear layer but the output layer and routers of a one-file checkpoint.

    Parameters
    ----------
    source, directory : Path
    method : str
        ``awq`` or ``gptq``.
    group : int
        Inputs that share a scale; -1 for all.
    symmetric : bool
        Zero points are all 8.
    v2 : bool
        GPTQ's second format, which stores zero points as they are.
    order : bool
        GPTQ: inputs in another order, as with ``desc_act``.
    changes
        Fields of ``quantization_config``.

    Returns
    -------
    dict of Tensor
        The model's state with the weights that the codes stand for.
    """
    directory.mkdir()
    state, stored, floats = load_file(source / "model.safetensors"), {}, {}
    generator = torch.Generator().manual_seed(0)
    for name, weight in state.items():
        module = name.removesuffix(".weight")
        if weight.dim() != 2 or module in ("lm_head", "model.embed_tokens") or module.endswith("moe.gate"):
            stored[name] = floats[name] = weight
            continue
        size = weight.shape[1] if group == -1 else group
        index = torch.arange(weight.shape[1]) // size
        if order:
            index = index[torch.randperm(len(index), generator=generator)]
        codes, scales, zeros = _quantize(weight.float(), index, symmetric)
        floats[name] = ((codes - zeros[:, index]) * scales.float()[:, index]).to(weight.dtype)
        pack = _awq if method == "awq" else _gptq
        words = pack(codes.T.contiguous(), zeros.T.contiguous(), 0 if v2 else 1)
        stored |= {f"{module}.{kind}": tensor for kind, tensor in words.items()}
        stored[f"{module}.scales"] = scales.T.contiguous()
        if method == "gptq":
            stored[f"{module}.g_idx"] = index.int()
    save_file({name: tensor.contiguous() for name, tensor in stored.items()}, directory / "model.safetensors")
    settings = {"quant_method": method, "bits": 4, "group_size": group}
    extra = {"zero_point": True, "version": "gemm"}
    if method == "gptq":
        extra = {"desc_act": order, "sym": symmetric, "checkpoint_format": "gptq_v2" if v2 else "gptq"}
    config = json.loads((source / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"quantization_config": settings | extra | changes}))
    return floats


def _quantize(weight: Tensor, index: Tensor, symmetric: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Codes ``[out, in]``, and scales (float16) and zero points ``[out, groups]``."""
    groups = int(index.max()) + 1
    scales, zeros = torch.empty(len(weight), groups), torch.full((len(weight), groups), 8)
    for g in range(groups):
        part = weight[:, index == g]
        if symmetric:
            scales[:, g] = part.abs().amax(1) / 7
        else:
            low, high = part.amin(1).clamp(max=0), part.amax(1).clamp(min=0)
            scales[:, g] = (high - low) / 15
            # GPTQ's first format cannot store 0: it stores one less.
            zeros[:, g] = (-low / scales[:, g]).round().clamp(1, 15)
    scales = scales.half()
    codes = (weight / scales.float()[:, index] + zeros[:, index]).round().clamp(0, 15).int()
    return codes, scales, zeros.int()


def _gptq(codes: Tensor, zeros: Tensor, offset: int) -> dict[str, Tensor]:
    """``codes [in, out]`` eight rows in a word, ``zeros [groups, out]`` eight columns in a word."""
    words = torch.zeros(len(codes) // 8, codes.shape[1], dtype=torch.int64)
    for place in range(8):
        words |= codes[place::8].long() << (4 * place)
    return {"qweight": _int32(words), "qzeros": _columns(zeros - offset, range(8))}


def _awq(codes: Tensor, zeros: Tensor, offset: int) -> dict[str, Tensor]:
    return {"qweight": _columns(codes, AWQ_ORDER), "qzeros": _columns(zeros, AWQ_ORDER)}


def _columns(values: Tensor, order: Any) -> Tensor:
    words = torch.zeros(len(values), values.shape[1] // 8, dtype=torch.int64)
    for place, column in enumerate(order):
        words |= values[:, column::8].long() << (4 * place)
    return _int32(words)


def _int32(words: Tensor) -> Tensor:
    return torch.where(words >= 1 << 31, words - (1 << 32), words).int()
