"""The model's shape."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

ACTIVATIONS = ("silu", "gelu_tanh")
"""What a gated MLP may apply to its gate."""
OVERFLOWING_FAMILIES = ("gemma2", "gemma3")
"""Families whose activations exceed float16's range (their checkpoints are bfloat16; vLLM refuses float16 as well)."""


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding.

    Parameters
    ----------
    theta : float
        Base of the frequencies.
    scaling : str
        ``none``, ``linear`` (positions divided by ``factor``), ``llama3`` (Llama 3.1 and later) or ``longrope``
        (arXiv 2402.13753; Phi-3).
    factor, low_freq_factor, high_freq_factor : float
        Scaling parameters, as in the checkpoint's ``rope_scaling``.
    original_max_position : int
        Context length the frequencies were trained for (``llama3`` and ``longrope``).
    rotary_fraction : float
        Share of each head's components, from the first on, that is rotated.
    divisors : tuple of float
        What each frequency is divided by (``longrope`` only), one per pair of rotated components.
    long_divisors : tuple of float
        The same for contexts longer than ``original_max_position``, until a build has chosen between the two.
    attention_factor : float
        Factor of cosines and sines (``longrope`` only).
    """

    theta: float = 10000.0
    scaling: str = "none"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192
    rotary_fraction: float = 1.0
    divisors: tuple[float, ...] = ()
    long_divisors: tuple[float, ...] = ()
    attention_factor: float = 1.0


@dataclass(frozen=True)
class ModelConfig:
    """Shape of a decoder-only transformer, independent of the checkpoint's own vocabulary of names.

    Sizes count elements. ``qkv_bias``, ``output_bias`` and ``mlp_bias`` say whether those linear layers add a bias.
    ``qk_norm``: each head's query and key is normalized before RoPE, with weights ``[head_dim]``. ``num_experts``: the
    MLP is a mixture of so many, of which each token is sent to ``experts_per_token``; 0 for one dense MLP.
    ``activation``: ``silu`` or ``gelu_tanh``, of the MLP's gate.

    ``sliding_window``: tokens a query sees, itself included, in every layer but ``full_layers``, or None for all.
    ``local_rope``: RoPE of those layers, where ``full_layers`` have another one, ``rope``. See `at_layer`.

    Gemma's: ``unit_offset_norm``: norms multiply by one plus their weight, in float32. ``output_norms``: what attention
    and MLP compute is normalized before it is added. ``embedding_scale``: factor of embeddings. ``query_scalar``:
    attention logits are divided by its square root, None for head_dim. ``attention_softcap``, ``logit_softcap``:
    attention logits and output logits x become ``cap * tanh(x / cap)``.
    """

    family: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    rms_norm_eps: float = 1e-5
    rope: RopeConfig = field(default_factory=RopeConfig)
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    num_experts: int = 0
    experts_per_token: int = 0
    activation: str = "silu"
    sliding_window: int | None = None
    full_layers: tuple[int, ...] = ()
    local_rope: RopeConfig | None = None
    unit_offset_norm: bool = False
    output_norms: bool = False
    embedding_scale: float = 1.0
    query_scalar: float | None = None
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    dtype: str = "float16"
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in (
            "num_layers",
            "hidden_size",
            "intermediate_size",
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "vocab_size",
        ):
            value = getattr(self, name)
            if value < 1:
                raise ValueError(f"{name}: expected a positive number, got {value}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads: expected a multiple of num_kv_heads ({self.num_kv_heads}), got {self.num_heads}"
            )
        if self.head_dim % 16:
            raise ValueError(f"head_dim: expected a multiple of 16, got {self.head_dim}")
        if self.num_experts and not 1 <= self.experts_per_token <= self.num_experts:
            raise ValueError(f"experts_per_token: expected 1 to {self.num_experts}, got {self.experts_per_token}")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation: expected one of {', '.join(ACTIVATIONS)}, got {self.activation!r}")
        for name in ("query_scalar", "attention_softcap", "logit_softcap"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name}: expected a positive number, got {value}")
        for name in ("divisors", "long_divisors"):
            given = len(getattr(self.rope, name))
            if given not in (0, self.rotary_dim // 2):
                raise ValueError(f"rope.{name}: expected {self.rotary_dim // 2} numbers, got {given}")

    @property
    def group_size(self) -> int:
        """Query heads that share one KV head."""
        return self.num_heads // self.num_kv_heads

    @property
    def rotary_dim(self) -> int:
        """Components of each head that RoPE rotates."""
        return int(self.head_dim * self.rope.rotary_fraction)

    @property
    def attention_scale(self) -> float:
        """Factor of the products of queries and keys."""
        return (self.head_dim if self.query_scalar is None else self.query_scalar) ** -0.5

    @property
    def cache_window(self) -> int | None:
        """Most tokens any layer's queries see: blocks behind it are no longer needed. None where one sees all."""
        return None if self.full_layers else self.sliding_window

    @property
    def half_dtype(self) -> str:
        """The 16-bit type to compute in: that of the weights, but bfloat16 where activations exceed float16's range."""
        return "bfloat16" if self.dtype == "bfloat16" or self.family in OVERFLOWING_FAMILIES else "float16"

    def rope_at(self, layer: int) -> RopeConfig:
        """RoPE of one layer's queries and keys."""
        return self.rope if self.local_rope is None or layer in self.full_layers else self.local_rope

    def at_layer(self, layer: int) -> ModelConfig:
        """The model as one layer's attention knows it: its window and its RoPE in every layer."""
        if not self.full_layers and self.local_rope is None:
            return self
        window = None if layer in self.full_layers else self.sliding_window
        return dataclasses.replace(
            self, sliding_window=window, full_layers=(), rope=self.rope_at(layer), local_rope=None
        )

    def for_context(self, max_seq_len: int) -> ModelConfig:
        """The model as an engine for sequences up to ``max_seq_len`` computes it, at every length.

        LongRoPE keeps one of its two sets of divisors, so that a key means the same however long its sequence grows
        (Hugging Face changes over while the cache holds the other kind). A window that no sequence outgrows is dropped.
        """
        rope = self.rope
        if rope.long_divisors:
            divisors = rope.long_divisors if max_seq_len > rope.original_max_position else rope.divisors
            rope = dataclasses.replace(rope, divisors=divisors, long_divisors=())
        window = None if self.sliding_window is None or self.sliding_window >= max_seq_len else self.sliding_window
        return dataclasses.replace(self, rope=rope, sliding_window=window)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> ModelConfig:
        values = dict(data)
        for name in ("rope", "local_rope"):
            rope = values.get(name)
            if rope is not None:
                lists = {key: tuple(value) for key, value in rope.items() if isinstance(value, list)}
                values[name] = RopeConfig(**{**rope, **lists})
        for name in ("eos_token_ids", "full_layers"):
            values[name] = tuple(values.get(name, ()))
        return cls(**values)
