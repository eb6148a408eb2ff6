"""Frozen configuration: the model's shape, the build's limits, the cache's budget."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

BLOCK_SIZE = 64
"""Tokens per cache block, in both tiers. Contract constant: kernels and functions rely on it."""

WEIGHT_FORMATS = ("fp32", "int8", "int4")
"""Weight formats the ONNX Runtime backend runs; int8 and int4 are weight-only with blocks of 32 (MatMulNBits)."""


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding.

    Parameters
    ----------
    theta : float
        Base of the frequencies.
    scaling : str
        ``none``, ``linear`` (positions divided by ``factor``) or ``llama3`` (Llama 3.1 and later).
    factor, low_freq_factor, high_freq_factor : float
        Scaling parameters, as in the checkpoint's ``rope_scaling``.
    original_max_position : int
        Context length the frequencies were trained for (``llama3`` only).
    """

    theta: float = 10000.0
    scaling: str = "none"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192


@dataclass(frozen=True)
class ModelConfig:
    """Shape of a decoder-only transformer, independent of the checkpoint's own vocabulary of names.

    Sizes count elements. ``qkv_bias``, ``output_bias`` and ``mlp_bias`` say whether those linear layers add a bias.
    ``sliding_window`` is the checkpoint's attention window in tokens, or None.
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
    activation: str = "silu"
    sliding_window: int | None = None
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

    @property
    def group_size(self) -> int:
        """Query heads that share one KV head."""
        return self.num_heads // self.num_kv_heads

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> ModelConfig:
        values = dict(data)
        values["rope"] = RopeConfig(**values["rope"])
        values["eos_token_ids"] = tuple(values["eos_token_ids"])
        return cls(**values)


@dataclass(frozen=True)
class BuildConfig:
    """Limits an engine is built for.

    Parameters
    ----------
    max_batch_size : int
        Sequences in one step.
    max_seq_len : int
        Prompt plus generated tokens of one sequence.
    max_num_tokens : int
        Tokens in one step over all sequences (prefill chunks and decodes).
    weights : str
        One of ``WEIGHT_FORMATS``.
    backend : str
        Name in ``minicache_trt.backends.BACKENDS``.
    window : int
        Most recent tokens kept exact, at least one block.
    quantum : int
        Prompt tokens that attend to one another exactly before they are demoted; a multiple of the block size.
    """

    max_batch_size: int = 8
    max_seq_len: int = 4096
    max_num_tokens: int = 2048
    weights: str = "fp32"
    backend: str = "onnxruntime"
    window: int = 64
    quantum: int = 2048

    def __post_init__(self) -> None:
        for name in ("max_batch_size", "max_seq_len", "max_num_tokens", "window", "quantum"):
            value = getattr(self, name)
            if value < 1:
                raise ValueError(f"{name}: expected a positive number, got {value}")
        if self.max_num_tokens < self.max_batch_size:
            raise ValueError(
                f"max_num_tokens: expected at least max_batch_size ({self.max_batch_size}), got {self.max_num_tokens}"
            )
        if self.quantum % BLOCK_SIZE:
            raise ValueError(f"quantum: expected a multiple of {BLOCK_SIZE}, got {self.quantum}")
        if self.weights not in WEIGHT_FORMATS:
            raise ValueError(f"weights: expected one of {', '.join(WEIGHT_FORMATS)}, got {self.weights!r}")


@dataclass(frozen=True)
class KvCacheConfig:
    """Memory for the cache; the call shape of TensorRT-LLM's ``KvCacheConfig``.

    Parameters
    ----------
    max_bytes : int, optional
        Bytes for both tiers together. Default: what ``max_batch_size`` sequences of ``max_seq_len`` tokens need.
    active_prefills : int
        Prompts that may hold a whole quantum in the full tier at the same time.
    enable_block_reuse : bool
        Keep blocks that nobody uses until their space is needed, and share blocks with equal contents: a prompt that
        begins like an earlier one is computed from where they differ.
    """

    max_bytes: int | None = None
    active_prefills: int = 1
    enable_block_reuse: bool = True

    def __post_init__(self) -> None:
        if self.max_bytes is not None and self.max_bytes < 1:
            raise ValueError(f"max_bytes: expected a positive number, got {self.max_bytes}")
        if self.active_prefills < 1:
            raise ValueError(f"active_prefills: expected a positive number, got {self.active_prefills}")
