"""SmoothQuant's scales against a model whose keys and queries are computed by other means."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from minicache_trt.checkpoint import resolve_config
from minicache_trt.compression import calibration_text
from minicache_trt.compression.calibration_text import PIECE_BYTES, sequence_length, token_sequences
from minicache_trt.compression.codec import compress_blocks, restore_blocks
from minicache_trt.compression.methods import make_plan
from minicache_trt.compression.smoothquant import MIN_TOKENS, key_scales, unit_scales, with_scales
from minicache_trt.compression.stream_constants import StreamConstants
from minicache_trt.config import ModelConfig
from minicache_trt.contract import plan_layout
from minicache_trt.errors import UserError
from tests.support.checkpoints import make_checkpoint

CONFIG = ModelConfig("llama", 4, 64, 64, 4, 2, 64, 100, 4096)
VOCABULARY = 101


class Letters:
    """A tokenizer of one token per character."""

    def encode(self, text: str) -> list[int]:
        return [ord(letter) % VOCABULARY for letter in text]

    def decode(self, token_ids: list[int], **_: Any) -> str:
        raise NotImplementedError


def silent(done: int, total: int) -> None:
    pass


@pytest.fixture
def letters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minicache_trt.compression.calibration_text.load_tokenizer", lambda directory: Letters())


def random_text(length: int, seed: int = 0) -> str:
    return "".join(map(chr, np.random.default_rng(seed).integers(32, 127, length)))


def observed_maxima(checkpoint: Path, sequences: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Largest magnitudes of keys and queries after RoPE, from the projections' outputs and Hugging Face's rotation."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, attn_implementation="eager")
    found: dict[tuple[str, int], torch.Tensor] = {}

    def keep(kind: str, layer: int) -> Any:
        return lambda module, inputs, output: found.update({(kind, layer): output[0]})

    for index, layer in enumerate(model.model.layers):
        layer.self_attn.q_proj.register_forward_hook(keep("q", index))
        layer.self_attn.k_proj.register_forward_hook(keep("k", index))
    heads, groups, dim = 2, 2, model.config.head_dim
    keys, queries = np.zeros((4, heads, dim)), np.zeros((4, heads, dim))
    for ids in sequences:
        with torch.no_grad():
            model(torch.tensor([ids]))
            cos, sin = model.model.rotary_emb(torch.zeros(1), torch.arange(len(ids))[None])
        for layer in range(4):
            q = found["q", layer].view(1, len(ids), heads * groups, dim).transpose(1, 2)
            k = found["k", layer].view(1, len(ids), heads, dim).transpose(1, 2)
            q, k = apply_rotary_pos_emb(q, k, cos, sin)
            keys[layer] = np.maximum(keys[layer], k[0].abs().amax(1))
            queries[layer] = np.maximum(queries[layer], q[0].abs().amax(1).view(heads, groups, dim).amax(1))
    return keys, queries


@pytest.mark.parametrize(
    "shape",
    [
        {"num_key_value_heads": 2, "num_attention_heads": 4},
        # Windows longer than the text: a sequence is as long as a window, at most.
        {"family": "gemma2", "attn_logit_softcapping": 2.0, "sliding_window": 800, "pad_token_id": 0},
    ],
    ids=["llama", "gemma2"],
)
def test_scales_are_those_of_the_definition(tmp_path: Path, letters: None, shape: dict[str, Any]) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint", **shape)
    config = resolve_config(str(checkpoint))
    documents = [random_text(700, 1), random_text(90, 2)]
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{document}\n\0" for document in documents), newline="")
    scales = key_scales(checkpoint, config, text, silent)
    keys, queries = observed_maxima(checkpoint, [Letters().encode(f"{document}\n") for document in documents])
    np.testing.assert_allclose(scales, np.sqrt(keys / queries), rtol=1e-4)
    text.write_bytes(text.read_bytes() * 3)
    np.testing.assert_array_equal(key_scales(checkpoint, config, text, silent), scales)


def test_scales_are_undone() -> None:
    """Keys with channels of very different size: restored up to the error of 8 bits of the smoothed channels."""
    torch.manual_seed(0)
    sizes = np.geomspace(0.1, 30, 64).astype(np.float32)
    scales = np.broadcast_to(sizes, (4, 2, 64)).copy()
    plan = with_scales(make_plan(CONFIG, "smoothquant"), scales).validate(CONFIG)
    plain = make_plan(CONFIG, "smoothquant")
    layout = plan_layout(plan, CONFIG)[0]
    x = torch.randn(1, 2, 2, 64, 64) * torch.from_numpy(sizes)
    block_index = torch.arange(2)
    errors = []
    for each in (plan, plain):
        constants = StreamConstants.of(each, 0)
        restored = restore_blocks(layout, compress_blocks(layout, x, block_index, constants), 0, block_index, constants)
        errors.append(((restored - x[0]).square().mean((0, 1, 2)).sqrt() / torch.from_numpy(sizes)).amax())
    assert errors[0] < 0.01 and errors[1] > 0.2


def test_unit_scales_change_nothing() -> None:
    plan = make_plan(CONFIG, "smoothquant")
    assert (unit_scales(CONFIG) == 1).all() and len(plan.matrices) == 3 * 4
    for name, value in plan.matrices.items():
        np.testing.assert_array_equal(value, np.zeros((2, 64)) if name.endswith("mean") else [np.eye(64)] * 2)


def test_text_is_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No piece is longer than what is read at a time, and no character is lost, whatever lies on a boundary."""
    text = "\ufeff" + ("caf\u00e9 \u20ac" * 20 + "\n\0") * 7 + "end"
    file = tmp_path / "text.txt"
    file.write_text(text, encoding="utf-8", newline="")
    config = ModelConfig("llama", 4, 64, 64, 4, 2, 64, VOCABULARY, 50)
    assert sequence_length(config) == 50
    expected = Letters().encode(text[1:].replace("\0", ""))
    done: list[tuple[int, int]] = []
    for size in (1, 2, 3, 7, 64, PIECE_BYTES):
        monkeypatch.setattr(calibration_text, "PIECE_BYTES", size)
        sequences = list(token_sequences(file, Letters(), config, lambda *at: done.append(at)))
        assert all(len(ids) <= 50 for ids in sequences)
        joined = [token for ids in sequences for token in ids]
        blank = {ord(" "), ord("\n")}  # pieces of blank characters alone are left out
        assert [t for t in joined if t not in blank] == [t for t in expected if t not in blank]
        assert done[-1] == (file.stat().st_size, file.stat().st_size)


def test_a_window_limits_the_sequence() -> None:
    window = ModelConfig("mistral", 4, 64, 64, 4, 2, 64, VOCABULARY, 4096, sliding_window=128)
    assert sequence_length(window) == 128 and sequence_length(CONFIG) == 2048


def test_texts_that_do_not_do(tmp_path: Path, letters: None) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint")
    config = resolve_config(str(checkpoint))

    def refused(name: str, content: bytes | None) -> str:
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError) as caught:
            key_scales(checkpoint, config, tmp_path / name, silent)
        return str(caught.value)

    assert "cannot be read: No such file" in refused("missing.txt", None)
    assert f"too short: 40 tokens, expected at least {MIN_TOKENS}" in refused("short.txt", b"abcd" * 10)
    assert "too short: 0 tokens" in refused("empty.txt", b"\n\0 \n")
    assert "is not UTF-8 text" in refused("binary.txt", b"abc\xff\xfe" * 500)
    assert "is not UTF-8 text" in refused("cut.txt", b"abc" * 500 + b"\xe2\x82")
    (tmp_path / "directory").mkdir()
    assert "cannot be read: Is a directory" in refused("directory", None)


def test_checkpoints_that_do_not_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint")
    config = resolve_config(str(checkpoint))
    text = tmp_path / "text.txt"
    text.write_text("abcd" * 500)
    with pytest.raises(UserError, match="no tokenizer"):
        key_scales(checkpoint, config, text, silent)

    class Foreign(Letters):
        def encode(self, text: str) -> list[int]:
            return [VOCABULARY]

    monkeypatch.setattr("minicache_trt.compression.calibration_text.load_tokenizer", lambda directory: Foreign())
    with pytest.raises(UserError, match="token 101 is beyond the model's vocabulary of 101"):
        key_scales(checkpoint, config, text, silent)
