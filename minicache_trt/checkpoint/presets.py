"""Models by a short name, with the shape in their hub config.json, so that planning one needs no download."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from minicache_trt.checkpoint import gemma_shapes as gemma
from minicache_trt.checkpoint import preset_shapes as shapes
from minicache_trt.checkpoint.hf_config import parse_config
from minicache_trt.config import ModelConfig


@dataclass(frozen=True)
class Preset:
    """A model by a short name.

    Parameters
    ----------
    name : str
    hub_id : str
        Repository on the Hugging Face Hub.
    raw_config : mapping
        The keys of that repository's config.json which ``parse_config`` reads.
    """

    name: str
    hub_id: str
    raw_config: Mapping[str, Any]

    @property
    def config(self) -> ModelConfig:
        return parse_config(self.raw_config, path=f"preset {self.name}")


PRESETS: dict[str, Preset] = {
    preset.name: preset
    for preset in (
        Preset("gemma2-2b", "google/gemma-2-2b", gemma.GEMMA2_2B),
        Preset("gemma2-2b-it", "google/gemma-2-2b-it", gemma.GEMMA2_2B | gemma.GEMMA2_CHAT),
        Preset("gemma2-9b", "google/gemma-2-9b", gemma.GEMMA2_9B),
        Preset("gemma2-9b-it", "google/gemma-2-9b-it", gemma.GEMMA2_9B | gemma.GEMMA2_CHAT),
        Preset("gemma2-27b", "google/gemma-2-27b", gemma.GEMMA2_27B),
        Preset("gemma2-27b-it", "google/gemma-2-27b-it", gemma.GEMMA2_27B | gemma.GEMMA2_CHAT),
        Preset("gemma3-1b", "google/gemma-3-1b-pt", gemma.GEMMA3_1B),
        Preset("gemma3-1b-it", "google/gemma-3-1b-it", gemma.GEMMA3_1B | gemma.GEMMA3_CHAT),
        Preset("gemma3-4b", "google/gemma-3-4b-pt", gemma.GEMMA3_4B),
        Preset("gemma3-4b-it", "google/gemma-3-4b-it", gemma.GEMMA3_4B | gemma.GEMMA3_CHAT),
        Preset("gemma3-12b", "google/gemma-3-12b-pt", gemma.GEMMA3_12B),
        Preset("gemma3-12b-it", "google/gemma-3-12b-it", gemma.GEMMA3_12B | gemma.GEMMA3_CHAT),
        Preset("gemma3-27b", "google/gemma-3-27b-pt", gemma.GEMMA3_27B),
        Preset("gemma3-27b-it", "google/gemma-3-27b-it", gemma.GEMMA3_27B | gemma.GEMMA3_CHAT),
        Preset("llama2-7b", "meta-llama/Llama-2-7b-hf", shapes.LLAMA2_7B),
        Preset("llama2-7b-chat", "meta-llama/Llama-2-7b-chat-hf", shapes.LLAMA2_7B),
        Preset("llama2-13b", "meta-llama/Llama-2-13b-hf", shapes.LLAMA2_13B),
        Preset("llama2-13b-chat", "meta-llama/Llama-2-13b-chat-hf", shapes.LLAMA2_13B),
        Preset("llama2-70b", "meta-llama/Llama-2-70b-hf", shapes.LLAMA2_70B),
        Preset("llama2-70b-chat", "meta-llama/Llama-2-70b-chat-hf", shapes.LLAMA2_70B),
        Preset("llama3-8b", "meta-llama/Meta-Llama-3-8B", shapes.LLAMA3_8B),
        Preset("llama3-8b-instruct", "meta-llama/Meta-Llama-3-8B-Instruct", shapes.LLAMA3_8B | shapes.LLAMA3_CHAT),
        Preset("llama3-70b", "meta-llama/Meta-Llama-3-70B", shapes.LLAMA3_70B),
        Preset(
            "llama3-70b-instruct",
            "meta-llama/Meta-Llama-3-70B-Instruct",
            shapes.LLAMA3_70B | shapes.LLAMA3_CHAT,
        ),
        Preset("llama3.1-8b", "meta-llama/Llama-3.1-8B", shapes.LLAMA31_8B),
        Preset("llama3.1-8b-instruct", "meta-llama/Llama-3.1-8B-Instruct", shapes.LLAMA31_8B | shapes.LLAMA31_CHAT),
        Preset("llama3.1-70b", "meta-llama/Llama-3.1-70B", shapes.LLAMA31_70B),
        Preset(
            "llama3.1-70b-instruct",
            "meta-llama/Llama-3.1-70B-Instruct",
            shapes.LLAMA31_70B | shapes.LLAMA31_CHAT,
        ),
        Preset("llama3.2-1b", "meta-llama/Llama-3.2-1B", shapes.LLAMA32_1B),
        Preset("llama3.2-1b-instruct", "meta-llama/Llama-3.2-1B-Instruct", shapes.LLAMA32_1B | shapes.LLAMA31_CHAT),
        Preset("llama3.2-3b", "meta-llama/Llama-3.2-3B", shapes.LLAMA32_3B),
        Preset("llama3.2-3b-instruct", "meta-llama/Llama-3.2-3B-Instruct", shapes.LLAMA32_3B | shapes.LLAMA31_CHAT),
        Preset(
            "llama3.3-70b-instruct",
            "meta-llama/Llama-3.3-70B-Instruct",
            shapes.LLAMA31_70B | shapes.LLAMA31_CHAT,
        ),
        Preset("mistral-7b", "mistralai/Mistral-7B-v0.1", shapes.MISTRAL_7B),
        Preset("mistral-7b-v0.3", "mistralai/Mistral-7B-v0.3", shapes.MISTRAL_7B_V3),
        Preset("mistral-7b-instruct-v0.1", "mistralai/Mistral-7B-Instruct-v0.1", shapes.MISTRAL_7B),
        Preset("mistral-7b-instruct-v0.2", "mistralai/Mistral-7B-Instruct-v0.2", shapes.MISTRAL_7B_V2),
        Preset("mistral-7b-instruct-v0.3", "mistralai/Mistral-7B-Instruct-v0.3", shapes.MISTRAL_7B_V3),
        Preset("mixtral-8x7b", "mistralai/Mixtral-8x7B-v0.1", shapes.MIXTRAL_8X7B),
        Preset("mixtral-8x7b-instruct", "mistralai/Mixtral-8x7B-Instruct-v0.1", shapes.MIXTRAL_8X7B),
        Preset("phi3-mini-4k-instruct", "microsoft/Phi-3-mini-4k-instruct", shapes.PHI3_MINI_4K),
        Preset("phi3-medium-4k-instruct", "microsoft/Phi-3-medium-4k-instruct", shapes.PHI3_MEDIUM_4K),
        Preset("qwen2.5-0.5b", "Qwen/Qwen2.5-0.5B", shapes.QWEN25_0_5B),
        Preset("qwen2.5-0.5b-instruct", "Qwen/Qwen2.5-0.5B-Instruct", shapes.QWEN25_0_5B | shapes.QWEN25_CHAT),
        Preset("qwen2.5-1.5b", "Qwen/Qwen2.5-1.5B", shapes.QWEN25_1_5B),
        Preset("qwen2.5-1.5b-instruct", "Qwen/Qwen2.5-1.5B-Instruct", shapes.QWEN25_1_5B | shapes.QWEN25_CHAT),
        Preset("qwen2.5-7b", "Qwen/Qwen2.5-7B", shapes.QWEN25_7B),
        Preset("qwen2.5-7b-instruct", "Qwen/Qwen2.5-7B-Instruct", shapes.QWEN25_7B | shapes.QWEN25_CHAT),
        Preset("qwen3-0.6b", "Qwen/Qwen3-0.6B", shapes.QWEN3_0_6B),
        Preset("qwen3-1.7b", "Qwen/Qwen3-1.7B", shapes.QWEN3_1_7B),
        Preset("qwen3-4b", "Qwen/Qwen3-4B", shapes.QWEN3_4B),
        Preset("qwen3-8b", "Qwen/Qwen3-8B", shapes.QWEN3_8B),
        Preset("smollm2-135m", "HuggingFaceTB/SmolLM2-135M", shapes.SMOLLM2_135M),
        Preset(
            "smollm2-135m-instruct",
            "HuggingFaceTB/SmolLM2-135M-Instruct",
            shapes.SMOLLM2_135M | {"bos_token_id": 1, "eos_token_id": 2},
        ),
        Preset("tinyllama-1.1b", "TinyLlama/TinyLlama-1.1B-Chat-v1.0", shapes.TINYLLAMA),
    )
}


def list_presets() -> list[Preset]:
    """All presets, by name."""
    return [PRESETS[name] for name in sorted(PRESETS)]
