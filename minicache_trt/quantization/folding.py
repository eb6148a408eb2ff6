"""Which linear layers' inputs can be divided by a scale per channel, and what undoes it before them, exactly.

norm  -> q, k, v           the norm's weights (plus one, Gemma's) are divided, the columns of the three are multiplied
v     -> o                 rows of v; query heads of a group share their KV head's scales
norm  -> gate, up          of the MLP or of all experts, and the router
up    -> down              rows of up: ``silu(gate) * up`` (or gelu) is linear in up
norm  -> lm_head           a tied embedding keeps its own numbers
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor

from minicache_trt.config import ModelConfig


@dataclass(frozen=True)
class Folding:
    """Linear layers that take the same inputs, and the op before them. Names are canonical, without ``.weight``.

    Parameters
    ----------
    linears : tuple of str
        The quantized ones.
    before : str
        A norm, or the linear layer whose outputs are (a factor of) the inputs.
    floats : tuple of str
        Layers with the same inputs that stay floats.
    heads : int
        Query heads per KV head of ``before``; 1 where inputs and its outputs correspond one to one.
    block : str
        What the error is measured at: ``attention``, ``mlp``, or ``linear`` for the layers' own outputs.
    """

    linears: tuple[str, ...]
    before: str
    floats: tuple[str, ...] = ()
    heads: int = 1
    block: str = "linear"


def foldings(config: ModelConfig, layer: int) -> list[Folding]:
    """Those of a decoder layer, in the order they are searched."""
    name = f"layers.{layer}"
    attention, norm = f"{name}.attention", f"{name}.post_attention_norm"
    found = [
        Folding(tuple(f"{attention}.{part}" for part in "qkv"), f"{name}.input_norm", block="attention"),
        Folding((f"{attention}.o",), f"{attention}.v", heads=config.group_size),
    ]
    experts = [f"{name}.moe.experts.{expert}" for expert in range(config.num_experts)]
    router = (f"{name}.moe.router",) if experts else ()
    mlps = experts or [f"{name}.mlp"]
    into = tuple(f"{mlp}.{part}" for mlp in mlps for part in ("gate", "up"))
    found.append(Folding(into, norm, router, block="mlp"))
    return found + [Folding((f"{mlp}.down",), f"{mlp}.up") for mlp in mlps]


def shared_scales(folding: Folding, scales: Tensor, config: ModelConfig) -> tuple[Tensor, Tensor]:
    """Scales of ``before``'s outputs and, from them, of the inputs; ``scales`` are per input."""
    if folding.heads == 1:
        return scales, scales
    grouped = scales.view(config.num_kv_heads, folding.heads, config.head_dim)
    own = grouped.log().mean(1).exp()
    return own.flatten(), own[:, None].expand_as(grouped).flatten()


def divided_norm(weight: Tensor, scales: Tensor, config: ModelConfig) -> Tensor:
    """A norm's weight ``[hidden]`` whose outputs are divided by ``scales``."""
    return (1 + weight) / scales - 1 if config.unit_offset_norm else weight / scales


def fold(folding: Folding, own: Tensor, scales: Tensor, weights: dict[str, Tensor], config: ModelConfig) -> None:
    """Divide what comes before by ``own`` and multiply columns by ``scales``, in place."""
    before = weights[f"{folding.before}.weight"]
    before.copy_(divided_norm(before, own, config) if before.dim() == 1 else before / own[:, None])
    if f"{folding.before}.bias" in weights:
        weights[f"{folding.before}.bias"] /= own
    for name in (*folding.linears, *folding.floats):
        weights[f"{name}.weight"] *= scales


def changed_names(config: ModelConfig, weights: Mapping[str, object]) -> Iterator[str]:
    """Floats that folding changes, ``weights`` being all names of the model: norms, biases and routers."""
    for layer in range(config.num_layers):
        for folding in foldings(config, layer):
            if "norm" in folding.before:
                yield f"{folding.before}.weight"
            elif f"{folding.before}.bias" in weights:
                yield f"{folding.before}.bias"
            yield from (f"{name}.weight" for name in folding.floats)
    yield "norm.weight"
