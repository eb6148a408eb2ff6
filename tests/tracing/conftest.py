"""Engines of a small random Llama, and of copies with one weight changed."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from minicache_trt.build import build_engine
from minicache_trt.compression.methods import make_plan
from minicache_trt.compression.plan import CompressionPlan
from minicache_trt.config import BuildConfig, ModelConfig
from tests.support.checkpoints import make_checkpoint

LIMITS = BuildConfig(max_batch_size=2, max_seq_len=320, max_num_tokens=48)
"""Prompts are prefilled in several chunks."""

Build = Callable[..., Path]
"""``build(plan, checkpoint=..., weights=...)``: an engine directory; plan is a method's name or makes one."""


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("source") / "checkpoint", head_dim=64)


@pytest.fixture(scope="session")
def build(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Build:
    def run(
        plan: str | Callable[[ModelConfig], CompressionPlan], checkpoint: Path = checkpoint, weights: str = "fp32"
    ) -> Path:
        def configure(config: ModelConfig) -> tuple[CompressionPlan, BuildConfig]:
            limits = BuildConfig(
                max_batch_size=LIMITS.max_batch_size,
                max_seq_len=LIMITS.max_seq_len,
                max_num_tokens=LIMITS.max_num_tokens,
                weights=weights,
            )
            return make_plan(config, plan) if isinstance(plan, str) else plan(config), limits

        output = tmp_path_factory.mktemp("built") / "engine"
        build_engine(str(checkpoint), output, configure)
        return output

    return run


@pytest.fixture
def perturbed(checkpoint: Path, tmp_path: Path) -> Callable[[str], Path]:
    """``perturbed(name)``: the checkpoint with one weight, by its Hugging Face name, a tenth larger."""

    def run(name: str) -> Path:
        copy = shutil.copytree(checkpoint, tmp_path / "perturbed")
        weights = load_file(copy / "model.safetensors")
        weights[name] = weights[name] * 1.1
        save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
        return copy

    return run
