"""AWQ: what is searched is least, what is folded is exact, and engines compute what their weights stand for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from minicache_trt.checkpoint import load_checkpoint
from minicache_trt.config import WEIGHT_BITS, BuildConfig
from minicache_trt.quantization.folding import fold, foldings, shared_scales
from minicache_trt.quantization.layer import InputStatistics, Layer
from minicache_trt.quantization.rounding import block_scales, blocks_of, rounded
from minicache_trt.quantization.search import CLIPS, best_alpha, channel_scales, clip_factors, scaled_rounding
from tests.support.checkpoints import LAYERED, make_checkpoint

SHAPES: dict[str, dict[str, Any]] = {
    "llama, GQA, biases": {"attention_bias": True, "mlp_bias": True},
    "qwen3": {"family": "qwen3"},
    "phi3": {"family": "phi3", "head_dim": None, "num_key_value_heads": 4, "hidden_size": 128},
    "mixtral": {"family": "mixtral", "num_local_experts": 4},
    "mistral, window 20": {"family": "mistral", "sliding_window": 20},
    "qwen2, window 20 from layer 1": {
        "family": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 20,
        "max_window_layers": 1,
    },
    "gemma2, caps": LAYERED["gemma2, scale 20, caps 5 and 3, GQA 6:2, bfloat16"] | {"dtype": "float32"},
    "gemma3, window 20": LAYERED["gemma3"] | {"sliding_window": 20},
}


@pytest.fixture(autouse=True)
def one_torch_thread() -> None:
    torch.set_num_threads(1)


@pytest.mark.parametrize("name", SHAPES)
def test_folding_changes_nothing(tmp_path: Path, name: str) -> None:
    """Random scales, every group of a layer, against Hugging Face's layer as it was."""
    import transformers

    source = make_checkpoint(tmp_path / "hf", **{**SHAPES[name], "num_hidden_layers": 2})
    checkpoint = load_checkpoint(str(source))
    config = checkpoint.config
    tokens = torch.arange(40)[None] % config.vocab_size
    # Its other implementations of attention leave caps out.
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, attn_implementation="eager")
    with torch.inference_mode():
        states = model(tokens, output_hidden_states=True).hidden_states
        layer = Layer(config, 1, checkpoint.weights)
        before = layer.output(states[1][0])
        # transformers hands out the last state normalized.
        norm = model.model.norm(before)
        assert torch.allclose(norm, states[2][0], atol=1e-4)
        generator = torch.Generator().manual_seed(0)
        for folding in foldings(config, 0):
            columns = layer.weights[f"{folding.linears[0]}.weight"].shape[1]
            scales = torch.rand(columns, generator=generator) * 3 + 0.2
            own, shared = shared_scales(folding, scales, config)
            old = layer.weights[f"{folding.linears[0]}.weight"].clone()
            fold(folding, own, shared, layer.weights, config)
            assert torch.allclose(layer.weights[f"{folding.linears[0]}.weight"], old * shared)
        after = layer.output(states[1][0])
    assert (after - before).abs().max() <= 1e-5 * before.abs().max()


def test_statistics_and_their_scaling() -> None:
    generator = torch.Generator().manual_seed(1)
    x, scales = torch.randn(50, 40, generator=generator), torch.rand(40, generator=generator) + 0.5
    found = InputStatistics.empty(40, 32)
    found.add(x[:13])
    found.add(x[13:])
    found.divide(scales)
    y = (x / scales).double()
    assert torch.allclose(found.magnitude.double(), y.abs().mean(0), rtol=1e-4)
    assert torch.allclose(found.moments[0].double(), y[:, :32].T @ y[:, :32], rtol=1e-3, atol=1e-3)
    assert torch.allclose(found.moments[1, :8, :8].double(), y[:, 32:].T @ y[:, 32:], rtol=1e-3, atol=1e-3)
    assert not found.moments[1, 8:].any()


def test_clips_are_the_best_of_those_tried() -> None:
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(6, 64, generator=generator) ** 3
    x = torch.randn(100, 64, generator=generator) * torch.rand(64, generator=generator) * 4
    statistics = InputStatistics.empty(64, 32)
    statistics.add(x)
    chosen = clip_factors(weight, statistics.moments, 4, 32)

    def error(factors: torch.Tensor) -> np.ndarray:
        """Squared error of each block's products, token by token."""
        blocks = blocks_of(weight, 32)
        values = rounded(blocks, block_scales(blocks, 4) * factors, 4)
        return np.array(
            [
                [float(((x[:, 32 * b : 32 * b + 32] @ (values - blocks)[row, b]) ** 2).sum()) for b in range(2)]
                for row in range(6)
            ]
        )

    least = np.min([error(torch.full((6, 2), factor)) for factor in (1.0, *CLIPS)], 0)
    assert np.allclose(error(chosen), least, rtol=1e-3)
    assert (least < error(torch.ones(6, 2))).any()


def test_alpha() -> None:
    assert best_alpha(lambda alpha: (alpha - 0.34) ** 2)[0] == pytest.approx(0.35)
    assert best_alpha(lambda alpha: alpha)[0] == 0
    scales = channel_scales(torch.tensor([1.0, 4.0, 16.0]), 0.5)
    assert torch.allclose(scales, torch.tensor([0.5, 1, 2]))


def test_scales_protect_large_inputs() -> None:
    """A few inputs are fifty times the others: their weights must not be rounded by a small neighbour's scale."""
    generator = torch.Generator().manual_seed(3)
    weight, x = torch.randn(32, 64, generator=generator), torch.randn(200, 64, generator=generator)
    x[:, ::17] *= 50

    def error(alpha: float) -> float:
        values = scaled_rounding(weight, channel_scales(x.abs().mean(0), alpha), 4, 32)
        return float((x @ (values - weight).T).square().sum())

    alpha, least = best_alpha(error)
    assert alpha > 0 and least < 0.5 * error(0)


def test_build_config() -> None:
    with pytest.raises(ValueError, match="group_size: expected 32, 64, 128, got 48"):
        BuildConfig(weights="int4", group_size=48)
    assert WEIGHT_BITS["int4_awq"] == 4
