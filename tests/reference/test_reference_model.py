"""Reference model against Hugging Face's forward pass and its own key-value cache."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from minicache_trt.compression.methods import MethodOptions, make_plan
from minicache_trt.compression.plan import CompressionPlan
from minicache_trt.compression.segment import Segment
from minicache_trt.compression.stream import Stream
from minicache_trt.config import BLOCK_SIZE, ModelConfig
from minicache_trt.errors import UserError
from minicache_trt.reference import Constants, Reference, compressed_length, encode, restore

FULL = CompressionPlan("full")
VOCAB = 96
TINY: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "llama-gqa": {},
    "llama-mha": {"num_key_value_heads": 4},
    "llama-head-dim-80": {"head_dim": 80},
    "llama-biases": {"attention_bias": True, "mlp_bias": True},
    "mistral": {"sliding_window": None},
    "mistral-sliding": {"sliding_window": 90},
}
Model = LlamaForCausalLM | MistralForCausalLM


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Models this small are slower on several threads, much slower on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make_model(variant: str, **overrides: Any) -> Model:
    """Random checkpoint whose biases are random too."""
    torch.manual_seed(0)
    options = {**TINY, **VARIANTS[variant], **overrides}
    mistral = variant.startswith("mistral")
    model: Model = MistralForCausalLM(MistralConfig(**options)) if mistral else LlamaForCausalLM(LlamaConfig(**options))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.2)
    return model


def shape_of(model: Model) -> ModelConfig:
    config: Any = model.config
    return ModelConfig(
        family="llama",
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim or config.hidden_size // config.num_attention_heads,
        vocab_size=config.vocab_size,
        max_position_embeddings=config.max_position_embeddings,
    )


def lossless_plan(model: Model) -> CompressionPlan:
    shape = shape_of(model)
    segment = (Segment(shape.head_dim),)
    streams = [Stream(part, (layer,), segment) for part in ("key", "value") for layer in range(shape.num_layers)]
    return CompressionPlan("custom", tuple(streams))


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 64}
ROPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "linear": {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "llama3": {"rope_scaling": {**LLAMA3, "low_freq_factor": 1.0, "high_freq_factor": 4.0}, "rope_theta": 5e5},
}


def calibrated_plan(model: Model, key_segments: tuple[Segment, ...], value_segments: tuple[Segment, ...]) -> Any:
    """Keys before RoPE and values of all layers in one linear stream each, with random orthonormal matrices."""
    shape = shape_of(model)
    heads, layers, width = shape.num_kv_heads, shape.num_layers, shape.num_layers * shape.head_dim
    rng = np.random.default_rng(0)
    streams = (
        Stream("key", tuple(range(layers)), key_segments, "linear", "pre_rope", True, True, retained=2, sink_tokens=1),
        Stream("value", tuple(range(layers)), value_segments, "linear", match_heads=True),
    )
    matrices: dict[str, Any] = {}
    for index, stream in enumerate(streams):
        axes = np.linalg.qr(rng.normal(size=(heads, width, width)))[0].astype(np.float32)
        own = {
            "head_map": np.stack([rng.permutation(heads) for _ in range(layers)]).astype(np.int32),
            "encode": axes[:, :, : stream.rank].copy(),
            "decode": axes[:, :, : stream.rank].swapaxes(1, 2).copy(),
            "mean": rng.normal(size=(heads, width)).astype(np.float32) / 8,
        }
        if stream.align:
            turns = rng.normal(size=(layers, heads, shape.head_dim, shape.head_dim))
            own["align"] = np.linalg.qr(turns)[0].astype(np.float32)
        if stream.gaussian:
            own["sigma"] = np.linspace(0.5, 0.1, heads * stream.rank).reshape(heads, -1).astype(np.float32)
        matrices |= {f"streams.{index}.{name}": value for name, value in own.items()}
    return CompressionPlan("custom", streams, matrices)


def random_tokens(length: int) -> list[int]:
    tokens: list[int] = torch.randint(VOCAB, (length,), generator=torch.Generator().manual_seed(length)).tolist()
    return tokens


# ---------------------------------------------------------------------------------------------------- demotion rule


@pytest.mark.parametrize(
    ("position", "expected"),
    [
        (0, 0),
        (2047, 0),
        (2048, 1984),
        (4095, 1984),
        (4096, 4032),
        (4999, 4032),
        (5000, 4928),
        (5055, 4928),
        (5056, 4992),
        (5119, 4992),
        (5120, 5056),
    ],
)
def test_compressed_length_of_a_prompt_of_5000(position: int, expected: int) -> None:
    assert compressed_length(position, prompt_len=5000, window=64, quantum=2048) == expected


@pytest.mark.parametrize(("position", "expected"), [(99, 0), (100, 0), (163, 0), (164, 64), (227, 64), (228, 128)])
def test_compressed_length_with_a_window_of_100(position: int, expected: int) -> None:
    assert compressed_length(position, prompt_len=100, window=100, quantum=128) == expected


# ------------------------------------------------------------------------------------------------------- equalities


@pytest.mark.parametrize("lossless", [False, True], ids=["full", "lossless"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_plans_that_lose_nothing_equal_hugging_face(variant: str, lossless: bool) -> None:
    model = make_model(variant)
    plan = lossless_plan(model) if lossless else FULL
    reference = Reference(model, plan, window=64, quantum=128)
    tokens = random_tokens(350)
    expected = reference.uncompressed_logits(tokens)
    assert expected.shape == (350, VOCAB)
    torch.testing.assert_close(reference.logits(tokens, prompt_len=280), expected, rtol=1e-4, atol=1e-4)
    assert [len(blocks) for blocks in reference.stored] == [4] * len(plan.streams)


@pytest.mark.parametrize("rope", ROPES)
def test_full_rank_streams_before_rope_equal_hugging_face(rope: str) -> None:
    model = make_model("llama-gqa", **ROPES[rope])
    width = 3 * shape_of(model).head_dim
    plan = calibrated_plan(model, (Segment(16), Segment(width - 16)), (Segment(width, transform="hadamard"),))
    reference = Reference(model, plan, window=64, quantum=128)
    tokens = random_tokens(350)
    expected = reference.uncompressed_logits(tokens)
    torch.testing.assert_close(reference.logits(tokens, prompt_len=280), expected, rtol=1e-3, atol=1e-3)


def test_checkpoint_directory(tmp_path: Path) -> None:
    model = make_model("llama-gqa")
    model.save_pretrained(tmp_path)
    tokens = random_tokens(150)
    expected = Reference(model, FULL).uncompressed_logits(tokens, start=100)
    reference = Reference(tmp_path, FULL, window=64, quantum=128)
    torch.testing.assert_close(reference.logits(tokens, 140, start=100), expected, rtol=1e-4, atol=1e-4)


def test_the_models_own_attention_is_put_back() -> None:
    model = make_model("llama-gqa")
    before = model.config._attn_implementation
    reference = Reference(model, FULL)
    with pytest.raises(IndexError):
        reference.logits([VOCAB], 1)
    assert model.config._attn_implementation == before


@pytest.mark.parametrize("start", [0, 127, 128, 199, 200, 300, 329])
def test_start_selects_rows(start: int) -> None:
    model = make_model("llama-gqa")
    reference = Reference(model, make_plan(shape_of(model), "kivi4"), window=64, quantum=128)
    tokens = random_tokens(330)
    everything = reference.logits(tokens, prompt_len=200)
    torch.testing.assert_close(reference.logits(tokens, prompt_len=200, start=start), everything[start:])


# ------------------------------------------------------------------------------------------------------ compression


def cached_logits(model: Model, plan: CompressionPlan, tokens: list[int], prompt_len: int) -> torch.Tensor:
    """Token by token through Hugging Face's own cache, rewriting its entries when the compressed tier grows."""
    cache = DynamicCache(config=model.config)
    done, rows = 0, []
    for position, token in enumerate(tokens):
        for block in range(done, compressed_length(position, prompt_len, 64, 128) // BLOCK_SIZE):
            span = slice(block * BLOCK_SIZE, (block + 1) * BLOCK_SIZE)
            for index, stream in enumerate(plan.streams):
                entries = [getattr(cache.layers[layer], f"{stream.part}s") for layer in stream.layers]
                x = torch.stack([entry[:, :, span] for entry in entries])
                constants = Constants.from_plan(plan, index, shape_of(model))
                encoded = encode(x, torch.tensor([block]), stream, constants=constants)
                for entry, restored in zip(entries, restore(encoded), strict=True):
                    entry[:, :, span] = restored
            done = block + 1
        with torch.no_grad():
            output = model(torch.tensor([[token]]), past_key_values=cache, use_cache=True)
        rows.append(output.logits[0, 0])
    return torch.stack(rows)


@pytest.mark.parametrize("norm", ["head", "token"])
@pytest.mark.parametrize("method", ["mean", "kivi2", "minicache", "minicache4"])
def test_compressed_history_matches_a_token_by_token_cache(method: str, norm: str) -> None:
    """Computed in float64, so that the order of summation moves no code across a rounding boundary."""
    model = make_model("llama-gqa").double()
    options = MethodOptions(merge_start=0, norm=norm, sink_tokens=2) if method != "kivi2" else None
    plan = make_plan(shape_of(model), method, options)
    tokens, prompt_len = random_tokens(330), 260
    actual = Reference(model, plan, window=64, quantum=128).logits(tokens, prompt_len)
    expected = cached_logits(model, plan, tokens, prompt_len)
    torch.testing.assert_close(actual, expected.float(), rtol=1e-4, atol=1e-4)


def test_calibrated_history_matches_a_token_by_token_cache() -> None:
    model = make_model("llama-gqa").double()
    keys = (Segment(16, "g4", transform="hadamard"), Segment(16, "g2"))
    values = (Segment(16, "int8", "channel"), Segment(16, "fp8", transform="hadamard"), Segment(16, "drop"))
    plan = calibrated_plan(model, keys, values)
    tokens = random_tokens(330)
    reference = Reference(model, plan, window=64, quantum=128)
    actual = reference.logits(tokens, 260)
    torch.testing.assert_close(actual, cached_logits(model, plan, tokens, 260).float(), rtol=1e-4, atol=1e-4)
    assert (actual - reference.uncompressed_logits(tokens))[128:].abs().amax() > 1e-2


def test_compression_changes_logits_from_the_second_quantum_on() -> None:
    model = make_model("llama-gqa")
    reference = Reference(model, make_plan(shape_of(model), "minicache"), window=64, quantum=128)
    tokens = random_tokens(256)
    difference = (reference.logits(tokens, 256) - reference.uncompressed_logits(tokens)).abs().amax(dim=1)
    assert difference[:128].max() < 1e-4
    assert difference[128:].min() > 1e-3


def test_stored_blocks_are_those_before_the_last_compressed_length() -> None:
    model = make_model("llama-gqa")
    plan = make_plan(shape_of(model), "minicache4")
    reference = Reference(model, plan, window=64, quantum=128)
    reference.logits(random_tokens(330), prompt_len=200)
    for stream, blocks in zip(plan.streams, reference.stored, strict=True):
        assert [block.block_index.tolist() for block in blocks] == [[0], [1], [2], [3]]
        assert all(block.stream == stream for block in blocks)


def test_greedy_follows_the_teacher_forced_argmax() -> None:
    model = make_model("llama-gqa")
    reference = Reference(model, make_plan(shape_of(model), "minicache4"), window=64, quantum=128)
    prompt = random_tokens(150)
    generated = reference.greedy(prompt, 140)
    stored = [len(blocks) for blocks in reference.stored]
    logits = reference.logits([*prompt, *generated[:-1]], prompt_len=150, start=149)
    assert logits.argmax(dim=1).tolist() == generated
    assert stored == [len(blocks) for blocks in reference.stored] == [3] * len(reference.plan.streams)
    assert reference.greedy(prompt, 1) == generated[:1]


# ----------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(("prompt_len", "start"), [(0, 0), (6, 0), (5, 5), (5, -1)])
def test_lengths_are_checked(prompt_len: int, start: int) -> None:
    with pytest.raises(ValueError, match=r"prompt_len|start"):
        Reference(make_model("llama-gqa"), FULL).logits(random_tokens(5), prompt_len, start)


def test_a_plan_that_does_not_fit_is_refused() -> None:
    plan = lossless_plan(make_model("llama-gqa", num_hidden_layers=2))
    with pytest.raises(UserError, match="no stream holds key 2"):
        Reference(make_model("llama-gqa"), plan)


@pytest.mark.parametrize(("window", "quantum"), [(0, 128), (64, 0)])
def test_window_and_quantum_are_checked(window: int, quantum: int) -> None:
    with pytest.raises(ValueError, match="window, quantum"):
        Reference(make_model("llama-gqa"), FULL, window=window, quantum=quantum)
