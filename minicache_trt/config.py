"""Frozen configuration: the model's shape, the build's limits, the cache's budget."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from minicache_trt.errors import UserError

BLOCK_SIZE = 64
"""Tokens per cache block, in both tiers. Contract constant: kernels and functions rely on it."""

WEIGHT_TYPES = {"fp16": "float16", "bf16": "bfloat16"}
"""Weight formats whose files hold floats of this type."""
WEIGHT_BITS = {"int8": 8, "int4": 4, "int4_awq": 4, "fp8": 8}
"""Bits of a code in the weight-only formats; fp8 is for TensorRT alone."""
ROW_FORMATS = ("int8", "fp8")
"""Of them those that have a scale for each output with TensorRT, and not for each group of its inputs."""
WEIGHT_FORMATS = ("fp32", *WEIGHT_TYPES, *WEIGHT_BITS)
"""Weight formats; fp32 takes the checkpoint's numbers as they are, in its own files."""
CALIBRATED_WEIGHTS = "int4_awq"
"""The weight format that is calibrated on text."""
GROUP_SIZES = (32, 64, 128)
"""Inputs that may share a scale in the weight-only formats."""

COMPUTE_DTYPES = ("float32", "float16", "bfloat16")
"""Types an engine's activations, weights and exact cache can have."""
BACKEND_DTYPES = {
    "onnxruntime": ("float32", "float16"),
    "torch": ("float32",),
    "host-kernels": ("float32",),
    "cuda": ("float16", "bfloat16"),
    "tensorrt": COMPUTE_DTYPES,
    "tensorrt-rtx": COMPUTE_DTYPES,
}
"""Compute types by backend."""
TENSORRT_BACKENDS = ("tensorrt", "tensorrt-rtx")
GPU_BACKENDS = ("cuda", *TENSORRT_BACKENDS)
GRAPH_BACKENDS = ("onnxruntime", *TENSORRT_BACKENDS)
"""Backends that run an engine's graphs, or what is built from them."""
AUTO = "auto"

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
    group_size : int
        Inputs that share a scale in the weight-only formats, one of ``GROUP_SIZES``.
    backend : str
        Name in ``minicache_trt.backends.BACKENDS``.
    dtype : str
        Compute type, one of ``COMPUTE_DTYPES``; ``auto`` until a build has chosen, see `for_model`.
    window : int
        Most recent tokens kept exact, at least one block.
    quantum : int
        Prompt tokens that attend to one another exactly before they are demoted; a multiple of the block size.
    tp_size : int
        Ranks that compute a step together, each with its share of heads and columns.
    """

    max_batch_size: int = 8
    max_seq_len: int = 4096
    max_num_tokens: int = 2048
    weights: str = "fp32"
    backend: str = "onnxruntime"
    window: int = 64
    quantum: int = 2048
    tp_size: int = 1
    dtype: str = AUTO
    group_size: int = 32

    def __post_init__(self) -> None:
        for name in ("max_batch_size", "max_seq_len", "max_num_tokens", "window", "quantum", "tp_size"):
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
        if self.group_size not in GROUP_SIZES:
            raise ValueError(f"group_size: expected {', '.join(map(str, GROUP_SIZES))}, got {self.group_size}")
        allowed = (AUTO, *BACKEND_DTYPES.get(self.backend, COMPUTE_DTYPES))
        if self.dtype not in allowed:
            raise ValueError(
                f"dtype: expected one of {', '.join(allowed)} with backend {self.backend}, got {self.dtype!r}"
            )

    @property
    def graph_dtype(self) -> str:
        """Compute type of the engine's graphs: float32 for backends that read the checkpoint instead of them."""
        return self.dtype if self.backend in GRAPH_BACKENDS else "float32"

    def for_model(self, config: ModelConfig) -> BuildConfig:
        """With a compute type: float32 on the CPU; on a GPU bfloat16 for such checkpoints, float16 for all others.

        Raises
        ------
        UserError
            float16 was asked for, which the model's activations exceed.
        """
        if self.dtype == "float16" and config.family in OVERFLOWING_FAMILIES:
            raise UserError(
                f"dtype: expected bfloat16 or float32 for {config.family}, whose activations exceed float16's range",
                "leave out --dtype",
            )
        if self.dtype != AUTO:
            return self
        if self.backend in ("onnxruntime", "torch", "host-kernels"):
            return dataclasses.replace(self, dtype="float32")
        return dataclasses.replace(self, dtype=config.half_dtype)


@dataclass(frozen=True)
class KvCacheConfig:
    """Memory for the cache; the call shape of TensorRT-LLM's ``KvCacheConfig``.

    Parameters
    ----------
    max_bytes : int, optional
        Bytes for both tiers together. Default: what ``max_batch_size`` sequences of ``max_seq_len`` tokens need.
    free_gpu_memory_fraction : float
        On a GPU, the cache takes at most this share of the memory that is free once the weights are loaded; the rest
        is for activations.
    active_prefills : int
        Prompts that may hold a whole quantum in the full tier at the same time.
    enable_block_reuse : bool
        Keep blocks that nobody uses until their space is needed, and share blocks with equal contents: a prompt that
        begins like an earlier one is computed from where they differ.
    """

    max_bytes: int | None = None
    free_gpu_memory_fraction: float = 0.9
    active_prefills: int = 1
    enable_block_reuse: bool = True

    def __post_init__(self) -> None:
        if self.max_bytes is not None and self.max_bytes < 1:
            raise ValueError(f"max_bytes: expected a positive number, got {self.max_bytes}")
        if not 0 < self.free_gpu_memory_fraction < 1:
            raise ValueError(
                f"free_gpu_memory_fraction: expected a number between 0 and 1, got {self.free_gpu_memory_fraction}"
            )
        if self.active_prefills < 1:
            raise ValueError(f"active_prefills: expected a positive number, got {self.active_prefills}")
