"""Sums over tokens against a direct pass over the same tokens, and the estimate they are for against measurements."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from minicache_trt.calibration.calibrate import token_weights
from minicache_trt.calibration.coded import CodedStream
from minicache_trt.calibration.collect import collect, first_moments, run_layers
from minicache_trt.calibration.evaluator import Evaluator
from minicache_trt.calibration.families import families
from minicache_trt.calibration.model import CalibrationModel
from minicache_trt.calibration.moments import Moments
from minicache_trt.calibration.samples import Samples, sample_sets
from minicache_trt.calibration.settings import CalibrationSettings
from minicache_trt.checkpoint import resolve_config
from minicache_trt.config import ModelConfig
from minicache_trt.runtime.tokenizer import load_tokenizer
from tests.calibration.conftest import random_tokens
from tests.support.checkpoints import LAYERED, make_checkpoint

LENGTH = 256


def samples_of(tokens: np.ndarray) -> Samples:
    scored = np.zeros(tokens.shape, bool)
    scored[:, 128:-1] = True
    return Samples(tokens, scored, np.arange(len(tokens)) % 3 == 2)


def collected(model: CalibrationModel, samples: Samples, gradients: int, weights: np.ndarray) -> Moments:
    moments = first_moments(model, samples, 3)
    return collect(
        model, samples, gradients, weights, 64, moments, 0, lambda sums, done: None, lambda done, total: None
    )


def projections(checkpoint: Path, config: ModelConfig, tokens: np.ndarray) -> list[np.ndarray]:
    """Keys before RoPE and values ``[L, S, T, H, D]`` from the outputs of the projections."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    found: list[list[np.ndarray]] = [[], []]
    for layer in model.model.layers:
        for kept, name in zip(found, ("k_proj", "v_proj"), strict=True):
            hook = lambda module, inputs, output, kept=kept: kept.append(output.double().numpy())  # noqa: E731
            getattr(layer.self_attn, name).register_forward_hook(hook)
    with torch.no_grad():
        model(torch.from_numpy(tokens))
    shape = (config.num_layers, *tokens.shape, config.num_kv_heads, config.head_dim)
    return [np.stack(kept).reshape(shape) for kept in found]


def test_sums_are_those_of_a_direct_pass(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint", hidden_size=96, num_attention_heads=6, num_key_value_heads=3)
    config = resolve_config(str(checkpoint)).for_context(LENGTH)
    tokens = random_tokens(5, LENGTH, config.vocab_size)
    weights = np.array([0.5, 2.0, 1.0, 0.7, 1.3])
    found = collected(CalibrationModel(checkpoint, config), samples_of(tokens), 0, weights)
    total = weights.sum() * LENGTH
    assert found.weight == pytest.approx(total)
    for part, states in enumerate(projections(checkpoint, config, tokens)):
        slots = np.stack([layer[:, :, heads] for layer, heads in zip(states, found.head_map[part], strict=True)])
        mean = np.einsum("s,lsthd->lhd", weights, slots)
        np.testing.assert_allclose(found.mean[part], mean, atol=1e-4 * total)
        for apart in range(3):
            for layer in range(config.num_layers - apart):
                pair = np.einsum("s,sthd,sthe->hde", weights, slots[layer], slots[layer + apart], optimize=True)
                np.testing.assert_allclose(found.second[part, apart, layer], pair, atol=1e-4 * total)
        joined = np.concatenate(list(slots[1:4]), -1)
        whole = np.einsum("s,sthd,sthe->hde", weights, joined, joined, optimize=True)
        np.testing.assert_allclose(found.group(found.second, part, (1, 2, 3)), whole, atol=1e-4 * total)
        np.testing.assert_allclose(found.group_mean(part, (2,)), mean[2] / total, atol=1e-4)
        norms = np.einsum("s,lsth->lh", weights, np.linalg.norm(states, axis=-1))
        np.testing.assert_allclose(found.norm[part], norms, rtol=1e-4)
    np.testing.assert_allclose(found.lowest[1], states.min((1, 2)), atol=1e-5)
    np.testing.assert_allclose(found.highest[1], states.max((1, 2)), atol=1e-5)


def test_keys_are_those_before_each_layers_rope(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint", **LAYERED["gemma3"])
    config = resolve_config(str(checkpoint)).for_context(LENGTH)
    model, expected, found = CalibrationModel(checkpoint, config), list[torch.Tensor](), list[torch.Tensor]()
    for layer in model._model.model.layers:
        layer.self_attn.k_norm.register_forward_hook(lambda module, inputs, output: expected.append(output))
    samples = samples_of(random_tokens(2, LENGTH, config.vocab_size))
    with torch.inference_mode():
        run_layers(model, samples, lambda layer, states: found.append(states[0]))
    assert len({config.rope_at(layer) for layer in range(config.num_layers)}) == 2
    for own, keys in zip(expected, found, strict=True):
        torch.testing.assert_close(keys, own, atol=1e-3, rtol=0)


def test_the_estimate_is_what_is_measured(demo: Path, code_text: Path) -> None:
    """Sensitivities times errors against the divergence that single streams cost, of which they know nothing.

    Which windows are drawn from these sources moves the median between 1.3 and 2.1.
    """
    settings = CalibrationSettings(length=LENGTH, moment_sequences=32, search_sequences=24, groups=(1, 2))
    config, tokenizer = resolve_config(str(demo)).for_context(LENGTH), load_tokenizer(demo)
    assert tokenizer is not None
    sets, model = sample_sets(code_text, tokenizer, config, settings), CalibrationModel(demo, config)
    moments = collected(model, sets.moments, 32, token_weights(sets.moments, 0.3))
    evaluator = Evaluator(model, sets.search, 64)
    ratios = []
    for family in families(moments, config, settings, LENGTH):
        if family.layers in ((3,), (3, 4), (6,)):
            linear = [each for each in family.candidates if each.stream.merge == "linear"]
            each = linear[len(linear) // 4]
            coded = CodedStream.of(each.stream, family.constants(each.stream), config)
            ratios.append(evaluator.measure([coded]).loss(0.3) / each.expected)
    assert len(ratios) == 9
    assert 0.5 < np.median(ratios) < 3
    assert min(ratios) > 0.2 and max(ratios) < 5


def test_weights_give_recall_its_share() -> None:
    samples = samples_of(random_tokens(9, LENGTH, 100))
    weights = token_weights(samples, 0.4)
    assert weights[samples.recall].sum() / weights.sum() == pytest.approx(0.4)
    assert (token_weights(samples.rows(slice(0, 2)), 0.4) == 1).all()


def test_sums_survive_a_file(tmp_path: Path) -> None:
    config = ModelConfig("llama", 3, 64, 64, 4, 2, 16, 100, 4096)
    rng = np.random.default_rng(0)
    moments = Moments.zeros(config, rng.integers(0, 2, (2, 3, 2)), 2)
    moments.second[:] = rng.standard_normal(moments.second.shape)
    moments.save(tmp_path / "sums.npz")
    again = Moments.load(tmp_path / "sums.npz")
    for name, value in vars(moments).items():
        np.testing.assert_array_equal(getattr(again, name), value)
