"""GGUF files: engines compute what the checkpoint they were made of does, or what transformers reads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from minicache_trt.checkpoint import load_checkpoint, resolve_config
from minicache_trt.errors import UserError
from minicache_trt.runtime.llm import LLM
from minicache_trt.runtime.request import SamplingParams
from tests.support.checkpoints import SHAPES, make_checkpoint
from tests.support.engines import build
from tests.support.gguf_writer import write_gguf
from tests.support.hf_agreement import assert_same_logits, hugging_face_model

LLAMA31 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
EXACT: dict[str, tuple[dict[str, Any], str]] = {
    "llama": ({"head_dim": 48}, "F32"),
    "llama, tied, bfloat16": ({"tie_word_embeddings": True, "dtype": "bfloat16"}, "BF16"),
    "llama 3.1 rope": ({"rope_parameters": LLAMA31, "max_position_embeddings": 131072}, "F32"),
    "llama, linear rope": (SHAPES["linear rope"], "F32"),
    "mistral, window": (SHAPES["mistral, window 90"], "F32"),
    "mixtral": (SHAPES["mixtral"] | {"num_hidden_layers": 2}, "F32"),
    "qwen2": (SHAPES["qwen2, GQA 6:2, head_dim 48"], "F32"),
    "qwen3, float16": (SHAPES["qwen3"] | {"dtype": "float16"}, "F16"),
    "phi3": (SHAPES["phi3"], "F32"),
}


@pytest.fixture(autouse=True)
def one_torch_thread() -> None:
    torch.set_num_threads(1)


@pytest.mark.parametrize("name", EXACT)
def test_logits_of_the_original(tmp_path: Path, name: str) -> None:
    shape, kind = EXACT[name]
    source = make_checkpoint(tmp_path / "hf", **shape)
    file = write_gguf(source, tmp_path / "model.gguf", kind)
    engine = build(file, tmp_path / "engine", "full", max_seq_len=512)
    assert_same_logits(engine, hugging_face_model(source))


QUANTIZED = ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"]


@pytest.mark.parametrize("kind", QUANTIZED)
def test_quantized_weights_are_those_transformers_reads(tmp_path: Path, kind: str) -> None:
    """To the 16 bits they are kept in; the interleaved rows of queries and keys included."""
    shape = {"hidden_size": 256, "intermediate_size": 256, "head_dim": 64, "num_hidden_layers": 2}
    source = make_checkpoint(tmp_path / "hf", **shape)
    file = write_gguf(source, tmp_path / f"model-{kind}.gguf", kind)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=file.name, dtype=torch.float32).state_dict()
    mine = load_checkpoint(str(file), work_dir=tmp_path / "work")
    assert mine.config.dtype == "float16"
    from minicache_trt.checkpoint import FAMILIES

    for canonical, view in mine.weights.items():
        expected = theirs[FAMILIES["llama"].hf_name(canonical)].numpy()
        expected = expected if expected.ndim == 1 else expected.astype(np.float16)
        assert np.array_equal(view.numpy(), expected), canonical


def test_logits_of_quantized_weights(tmp_path: Path) -> None:
    """transformers' own reading of the file, its weights rounded to the 16 bits we keep."""
    source = make_checkpoint(tmp_path / "hf", hidden_size=128, intermediate_size=160)
    file = write_gguf(source, tmp_path / "model.gguf", "Q8_0")
    engine = build(file, tmp_path / "engine", "full", max_seq_len=512)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=file.name, dtype=torch.float32).state_dict()
    model = hugging_face_model(source)
    model.load_state_dict({name: weight.half().float() for name, weight in theirs.items()})
    assert_same_logits(engine, model)


def test_phi3_with_longrope(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "hf", **SHAPES["phi3, LongRoPE"])
    config = resolve_config(str(write_gguf(source, tmp_path / "model.gguf")))
    expected = resolve_config(str(source))
    assert config.rope.scaling == "longrope" and config.rope.attention_factor == expected.rope.attention_factor
    assert np.allclose(config.rope.long_divisors, expected.rope.long_divisors)
    assert np.allclose(config.rope.divisors, expected.rope.divisors)


def test_a_directory_with_one_file_and_a_split_one(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "hf", num_hidden_layers=1)
    (tmp_path / "models").mkdir()
    file = write_gguf(source, tmp_path / "models" / "a.gguf")
    assert resolve_config(str(tmp_path / "models")).num_layers == 1
    file.with_name("b.gguf").write_bytes(file.read_bytes())
    with pytest.raises(UserError, match=r"2 GGUF files \(a.gguf, b.gguf\)"):
        resolve_config(str(tmp_path / "models"))
    file.with_name("b.gguf").unlink()
    file.rename(file.with_name("m-00001-of-00002.gguf"))
    with pytest.raises(UserError, match=r"m-00002-of-00002.gguf missing"):
        resolve_config(str(tmp_path / "models"))


def vocabulary(writer: gguf.GGUFWriter) -> None:
    """A byte-level BPE tokenizer of bytes alone."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    tokens = [*bytes_to_unicode().values(), "th", "he", "<s>", "</s>"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("llama-bpe")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.NORMAL] * 258 + [gguf.TokenType.CONTROL] * 2)
    writer.add_token_merges(["t h", "h e"])
    writer.add_chat_template("{{ messages[0].content }}")


def test_tokenizer_and_chat_template(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    source = make_checkpoint(tmp_path / "hf", num_hidden_layers=1, vocab_size=260)
    file = write_gguf(source, tmp_path / "model.gguf", edit=vocabulary)
    checkpoint = load_checkpoint(str(file), work_dir=tmp_path / "work")
    assert checkpoint.notes == ()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "work")
    assert tokenizer.decode(tokenizer("a cat", add_special_tokens=False).input_ids) == "a cat"
    assert tokenizer.chat_template == "{{ messages[0].content }}"
    assert "tokenizer.json" in [path.name for path in checkpoint.sidecar_files()]


def test_without_a_tokenizer_there_is_a_note(tmp_path: Path) -> None:
    file = write_gguf(make_checkpoint(tmp_path / "hf", num_hidden_layers=1), tmp_path / "model.gguf")
    (note,) = load_checkpoint(str(file), work_dir=tmp_path / "work").notes
    assert "could not be converted" in note and "--tokenizer DIR" in note


def test_llm_takes_a_file(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "hf", num_hidden_layers=2, max_position_embeddings=256)
    file = write_gguf(source, tmp_path / "model.gguf")
    llm = LLM(model=file, method="full", num_threads=1)
    (output,) = llm.generate([[5, 6, 7]], SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True))
    model = hugging_face_model(source)
    model.generation_config.eos_token_id = None
    ids = torch.tensor([[5, 6, 7]])
    theirs = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
    assert output.outputs[0].token_ids == theirs[0, 3:].tolist()


def other_freqs(writer: gguf.GGUFWriter) -> None:
    writer.add_tensor("rope_freqs.weight", np.full(16, 3.0, np.float32))


@pytest.mark.parametrize(
    ("edit", "cause"),
    [
        (lambda writer: writer.add_rope_scaling_type(gguf.RopeScalingType.YARN), "rope.scaling.type: expected none"),
        (other_freqs, "rope_freqs.weight holds divisors"),
        (lambda writer: writer.add_rope_dimension_count(16), "rope.dimension_count: expected 32, got 16"),
        (lambda writer: writer.add_head_count_kv([2, 1, 2, 2]), "one positive number for all layers"),
        (lambda writer: writer.add_block_count(5), "weights are missing: blk.4.attn_norm.weight"),
        (lambda writer: writer.add_feed_forward_length(97), "blk.0.ffn_gate.weight: expected shape [97, 64]"),
    ],
)
def test_refusals(tmp_path: Path, edit: Callable[[gguf.GGUFWriter], Any], cause: str) -> None:
    def change(writer: gguf.GGUFWriter) -> None:
        keys = [dict(part) for part in writer.kv_data]
        edit(writer)  # warns of a duplicate, and replaces it
        assert [dict(part) for part in writer.kv_data] != keys or writer.tensors

    file = write_gguf(make_checkpoint(tmp_path / "hf"), tmp_path / "model.gguf", edit=change)
    with pytest.raises(UserError) as error:
        load_checkpoint(str(file), work_dir=tmp_path / "work")
    assert cause in error.value.cause and error.value.remedy


@pytest.mark.parametrize("size", [0, 3, 100, 2000, -1000])
def test_damaged_files(tmp_path: Path, size: int) -> None:
    file = write_gguf(make_checkpoint(tmp_path / "hf"), tmp_path / "model.gguf")
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(UserError, match=r"model.gguf: (not a GGUF file, or damaged|truncated)"):
        load_checkpoint(str(file), work_dir=tmp_path / "work")


def test_another_architecture(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "gemma2")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UserError, match=r"general.architecture 'gemma2' is not supported"):
        resolve_config(str(tmp_path / "x.gguf"))
