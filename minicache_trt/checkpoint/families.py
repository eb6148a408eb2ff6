"""Model families as table rows: how each one's checkpoints spell what the decoder reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

_LLAMA_MODULES = {
    "embed": "model.embed_tokens",
    "layers.{i}.input_norm": "model.layers.{i}.input_layernorm",
    "layers.{i}.attention.q": "model.layers.{i}.self_attn.q_proj",
    "layers.{i}.attention.k": "model.layers.{i}.self_attn.k_proj",
    "layers.{i}.attention.v": "model.layers.{i}.self_attn.v_proj",
    "layers.{i}.attention.q_norm": "model.layers.{i}.self_attn.q_norm",
    "layers.{i}.attention.k_norm": "model.layers.{i}.self_attn.k_norm",
    "layers.{i}.attention.o": "model.layers.{i}.self_attn.o_proj",
    "layers.{i}.post_attention_norm": "model.layers.{i}.post_attention_layernorm",
    "layers.{i}.mlp.gate": "model.layers.{i}.mlp.gate_proj",
    "layers.{i}.mlp.up": "model.layers.{i}.mlp.up_proj",
    "layers.{i}.mlp.down": "model.layers.{i}.mlp.down_proj",
    "norm": "model.norm",
    "lm_head": "lm_head",
}
_PHI3_MODULES = _LLAMA_MODULES | {
    **{f"layers.{{i}}.attention.{part}": "model.layers.{i}.self_attn.qkv_proj" for part in "qkv"},
    **{f"layers.{{i}}.mlp.{part}": "model.layers.{i}.mlp.gate_up_proj" for part in ("gate", "up")},
}
_MIXTRAL_MODULES = _LLAMA_MODULES | {
    "layers.{i}.moe.router": "model.layers.{i}.block_sparse_moe.gate",
    "layers.{i}.moe.experts.{e}.gate": "model.layers.{i}.block_sparse_moe.experts.{e}.w1",
    "layers.{i}.moe.experts.{e}.up": "model.layers.{i}.block_sparse_moe.experts.{e}.w3",
    "layers.{i}.moe.experts.{e}.down": "model.layers.{i}.block_sparse_moe.experts.{e}.w2",
}
_GEMMA_MODULES = _LLAMA_MODULES | {
    "layers.{i}.attention.output_norm": "model.layers.{i}.post_attention_layernorm",
    "layers.{i}.post_attention_norm": "model.layers.{i}.pre_feedforward_layernorm",
    "layers.{i}.mlp.output_norm": "model.layers.{i}.post_feedforward_layernorm",
}
_GEMMA_FIELDS = {
    "qkv_bias": "attention_bias",
    "output_bias": "attention_bias",
    "sliding_window": "sliding_window",
    "query_scalar": "query_pre_attn_scalar",
    "logit_softcap": "final_logit_softcapping",
}
_GEMMA_DEFAULTS: dict[str, Any] = {
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "tie_word_embeddings": True,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
}
_GEMMA_CONSTANTS = {"activation": "gelu_tanh", "unit_offset_norm": True, "output_norms": True}
_QWEN_WINDOW = {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28}
_QWEN_DEFAULTS = {"num_key_value_heads": 32, "bos_token_id": None, "eos_token_id": None, **_QWEN_WINDOW}


@dataclass(frozen=True)
class Family:
    """One row of ``FAMILIES``.

    Parameters
    ----------
    name : str
        ``ModelConfig.family``.
    architectures : tuple of str
        Values of config.json's ``architectures`` that this row covers.
    model_type : str
        config.json's ``model_type``, which decides where ``architectures`` is absent.
    modules : mapping of str to str
        Canonical module to the checkpoint's module; ``{i}`` is the layer, ``{e}`` the expert. Modules with the same
        name are stacked in one tensor of the checkpoint, row under row, in the order of `weight_shapes`.
    fields : mapping of str to str
        ``ModelConfig`` fields that only some families have, to their config.json keys. A field that is not listed keeps
        ``ModelConfig``'s default whatever config.json says.
    defaults : mapping
        What an absent config.json key means, as in the family's transformers configuration. A family with
        ``use_sliding_window`` here has windows only where that is set, from layer ``max_window_layers`` on; one with
        ``sliding_window_pattern`` in all layers but every so-manieth; one with ``rope_local_base_freq`` has another
        RoPE in layers with a window.
    constants : mapping
        ``ModelConfig`` fields that are the same in all of the family's models.
    partial_rotary : bool
        Whether config.json's ``partial_rotary_factor`` is read.
    activation : tuple of str
        config.json's key of the MLP's activation, and the only value it may have.
    scaled_embedding : bool
        Whether embeddings are multiplied by the square root of hidden_size.
    text_part : str
        Value of ``architectures`` of models that also take images, whose language model, ``text_config``, is of this
        family.
    """

    name: str
    architectures: tuple[str, ...]
    model_type: str
    modules: Mapping[str, str]
    fields: Mapping[str, str]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    constants: Mapping[str, Any] = field(default_factory=dict)
    partial_rotary: bool = False
    activation: tuple[str, str] = ("hidden_act", "silu")
    scaled_embedding: bool = False
    text_part: str = ""

    def hf_name(self, canonical: str) -> str:
        """The checkpoint's name of a canonical weight: ``layers.3.attention.q.weight`` to ``...q_proj.weight``."""
        module, _, leaf = canonical.rpartition(".")
        numbers = {}
        for place, before in (("{i}", "layers."), ("{e}", "experts.")):
            head, found, tail = module.partition(before)
            if found:
                numbers[place], _, rest = tail.partition(".")
                module = f"{head}{before}{place}.{rest}"
        name = self.modules[module]
        for place, number in numbers.items():
            name = name.replace(place, number)
        return f"{name}.{leaf}"


FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        Family(
            name="llama",
            architectures=("LlamaForCausalLM",),
            model_type="llama",
            modules=_LLAMA_MODULES,
            fields={"qkv_bias": "attention_bias", "output_bias": "attention_bias", "mlp_bias": "mlp_bias"},
        ),
        Family(
            name="mistral",
            architectures=("MistralForCausalLM",),
            model_type="mistral",
            modules=_LLAMA_MODULES,
            fields={"sliding_window": "sliding_window"},
            defaults={"num_key_value_heads": 8, "sliding_window": 4096},
        ),
        Family(
            name="mixtral",
            architectures=("MixtralForCausalLM",),
            model_type="mixtral",
            modules=_MIXTRAL_MODULES,
            fields={
                "sliding_window": "sliding_window",
                "num_experts": "num_local_experts",
                "experts_per_token": "num_experts_per_tok",
            },
            defaults={
                "num_key_value_heads": 8,
                "rms_norm_eps": 1e-5,
                "num_local_experts": 8,
                "num_experts_per_tok": 2,
                "rope_theta": 1e6,
            },
        ),
        Family(
            name="qwen2",
            architectures=("Qwen2ForCausalLM",),
            model_type="qwen2",
            modules=_LLAMA_MODULES,
            fields={"sliding_window": "sliding_window"},
            defaults=_QWEN_DEFAULTS,
            constants={"qkv_bias": True},
        ),
        Family(
            name="qwen3",
            architectures=("Qwen3ForCausalLM",),
            model_type="qwen3",
            modules=_LLAMA_MODULES,
            fields={
                "qkv_bias": "attention_bias",
                "output_bias": "attention_bias",
                "sliding_window": "sliding_window",
            },
            defaults={**_QWEN_DEFAULTS, "head_dim": 128},
            constants={"qk_norm": True},
        ),
        Family(
            name="phi3",
            architectures=("Phi3ForCausalLM",),
            model_type="phi3",
            modules=_PHI3_MODULES,
            fields={"sliding_window": "sliding_window"},
            defaults={"rms_norm_eps": 1e-5, "original_max_position_embeddings": 4096, "eos_token_id": 32000},
            partial_rotary=True,
        ),
        Family(
            name="gemma2",
            architectures=("Gemma2ForCausalLM",),
            model_type="gemma2",
            modules=_GEMMA_MODULES,
            fields={**_GEMMA_FIELDS, "attention_softcap": "attn_logit_softcapping"},
            defaults={
                **_GEMMA_DEFAULTS,
                "sliding_window_pattern": 2,
                "attn_logit_softcapping": 50.0,
                "final_logit_softcapping": 30.0,
            },
            constants=_GEMMA_CONSTANTS,
            activation=("hidden_activation", "gelu_pytorch_tanh"),
            scaled_embedding=True,
        ),
        Family(
            name="gemma3",
            architectures=("Gemma3ForCausalLM",),
            model_type="gemma3_text",
            modules=_GEMMA_MODULES,
            fields=_GEMMA_FIELDS,  # transformers reads attn_logit_softcapping and caps nothing by it
            defaults={
                **_GEMMA_DEFAULTS,
                "vocab_size": 262208,
                "max_position_embeddings": 131072,
                "sliding_window_pattern": 6,
                "rope_theta": 1e6,
                "rope_local_base_freq": 1e4,
            },
            constants={**_GEMMA_CONSTANTS, "qk_norm": True},
            activation=("hidden_activation", "gelu_pytorch_tanh"),
            scaled_embedding=True,
            text_part="Gemma3ForConditionalGeneration",
        ),
    )
}
