"""Dummies: loadable by transformers, cheap for large shapes, harmless to real checkpoints."""

import json
import time
import tracemalloc

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from minicache_trt.checkpoint import load_checkpoint, weight_shapes
from minicache_trt.checkpoint.dummy import PAGE, STRIDE
from minicache_trt.errors import UserError


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_small_dummy_runs_in_transformers(write_config, tmp_path, dtype):
    checkpoint = load_checkpoint(str(write_config(dtype=dtype)), load_format="dummy", work_dir=tmp_path / "dummy")
    assert checkpoint.dummy and checkpoint.config.dtype == dtype
    model, report = AutoModelForCausalLM.from_pretrained(checkpoint.directory, dtype="auto", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert str(model.dtype) == f"torch.{dtype}"
    for canonical, view in checkpoint.weights.items():
        values = view.numpy().astype(np.float32)
        assert torch.equal(model.state_dict()[view.name], view.torch())
        if canonical.endswith("norm.weight"):
            assert (values == 1).all()
        else:
            assert values.std() == pytest.approx(0.02, rel=0.1)
    logits = model.float()(torch.arange(10)[None]).logits
    assert logits.isfinite().all() and logits.std() > 0


def test_dummy_of_a_7b_shape_is_sparse_and_cheap(tmp_path):
    tracemalloc.start()
    started = time.perf_counter()
    checkpoint = load_checkpoint("llama2-7b", load_format="dummy", work_dir=tmp_path)
    seconds, peak = time.perf_counter() - started, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    (path,) = checkpoint.weight_files()
    assert path.stat().st_size > 2 * 6_738_415_616
    assert path.stat().st_blocks * 512 < 30e6
    assert seconds < 10 and peak < 50e6
    assert {name: view.shape for name, view in checkpoint.weights.items()} == weight_shapes(checkpoint.config)
    assert load_checkpoint(str(tmp_path)).dummy
    assert load_checkpoint(str(tmp_path)).checksum() == checkpoint.checksum()
    view = checkpoint.weights["layers.31.mlp.down.weight"]
    values = view.numpy().reshape(-1)
    for start in range(0, view.nbytes // 2, STRIDE // 2):
        assert 0.015 < values[start : start + PAGE // 2].astype(np.float32).std() < 0.025
    assert not values[PAGE // 2 : STRIDE // 2].any()
    assert (checkpoint.weights["layers.31.input_norm.weight"].numpy() == 1).all()


def test_seeded(write_config, tmp_path):
    directory = write_config()
    files = [
        load_checkpoint(str(directory), load_format="dummy", work_dir=tmp_path / name).weight_files()[0]
        for name in ("a", "b", "a")
    ]
    assert files[0].read_bytes() == files[1].read_bytes() and files[0] == files[2]


def test_biases_and_tied_embeddings(write_config, tmp_path):
    directory = write_config(attention_bias=True, mlp_bias=True, tie_word_embeddings=True)
    checkpoint = load_checkpoint(str(directory), load_format="dummy", work_dir=tmp_path / "dummy")
    assert checkpoint.weights["layers.1.mlp.down.bias"].numpy().any()
    assert "lm_head.weight" not in checkpoint.weights


def test_tokenizer_travels_along(write_config, tmp_path):
    directory = write_config()
    (directory / "tokenizer.json").write_text('{"a": 1}')
    checkpoint = load_checkpoint(str(directory), load_format="dummy", work_dir=tmp_path / "dummy")
    assert json.loads((checkpoint.directory / "tokenizer.json").read_text()) == {"a": 1}


def test_default_work_directory_is_new(write_config, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    checkpoint = load_checkpoint(str(write_config()), load_format="dummy")
    assert checkpoint.directory.parent == tmp_path


def test_real_checkpoint_is_not_replaced(save_model):
    directory, _ = save_model()
    before = (directory / "model.safetensors").read_bytes()
    with pytest.raises(UserError, match="holds a checkpoint, which a dummy would replace"):
        load_checkpoint(str(directory), load_format="dummy", work_dir=directory)
    with pytest.raises(UserError, match="holds a checkpoint"):
        load_checkpoint("llama3.2-1b", load_format="dummy", work_dir=directory)
    assert (directory / "model.safetensors").read_bytes() == before


def test_work_directory_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="the dummy checkpoint cannot be written") as caught:
        load_checkpoint("llama3.2-1b", load_format="dummy", work_dir=tmp_path / "file" / "below")
    assert caught.value.remedy
