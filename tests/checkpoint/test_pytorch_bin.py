"""PyTorch checkpoints: the same weights, bit by bit; pickles that hold anything else are refused."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from minicache_trt.checkpoint import load_checkpoint
from minicache_trt.checkpoint.pytorch_bin import FILE, INDEX
from minicache_trt.errors import UserError
from tests.support.checkpoints import make_checkpoint
from tests.support.engines import build
from tests.support.hf_agreement import assert_same_logits, hugging_face_model


@pytest.fixture(autouse=True)
def one_torch_thread() -> None:
    torch.set_num_threads(1)


def to_pickles(source: Path, directory: Path, shards: int = 1, legacy: bool = False) -> Path:
    """The checkpoint as transformers saved them before safetensors, in one file or several with an index."""
    directory.mkdir()
    (directory / "config.json").write_bytes((source / "config.json").read_bytes())
    state = load_file(source / "model.safetensors")
    names = [f"pytorch_model-{i + 1:05}-of-{shards:05}.bin" for i in range(shards)] if shards > 1 else [FILE]
    places = {name: names[i % shards] for i, name in enumerate(state)}
    for file in names:
        part = {name: state[name] for name, place in places.items() if place == file}
        torch.save(part, directory / file, _use_new_zipfile_serialization=not legacy)
    if shards > 1:
        (directory / INDEX).write_text(json.dumps({"weight_map": places}))
    return directory


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize(("shards", "legacy"), [(1, False), (3, False), (2, True)])
def test_the_same_weights(tmp_path: Path, dtype: str, shards: int, legacy: bool) -> None:
    source = make_checkpoint(tmp_path / "hf", dtype=dtype, num_hidden_layers=2)
    directory = to_pickles(source, tmp_path / "bin", shards, legacy)
    original, mine = load_checkpoint(str(source)), load_checkpoint(str(directory), work_dir=tmp_path / "work")
    assert mine.config == original.config and mine.weights.keys() == original.weights.keys()
    for name, view in original.weights.items():
        assert mine.weights[name].dtype == view.dtype
        assert np.array_equal(mine.weights[name].numpy(), view.numpy())


def test_logits(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "hf", family="phi3", head_dim=None, hidden_size=128)
    engine = build(to_pickles(source, tmp_path / "bin", shards=2), tmp_path / "engine", "full", max_seq_len=512)
    assert_same_logits(engine, hugging_face_model(source))


def test_unused_buffers_are_left_out_and_safetensors_come_first(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "hf")
    directory = to_pickles(source, tmp_path / "bin")
    state = torch.load(directory / FILE, weights_only=True) | {"model.mask": torch.ones(3, dtype=torch.bool)}
    torch.save(state, directory / FILE)
    loaded = load_checkpoint(str(directory), work_dir=tmp_path / "work")
    assert (
        loaded.format == "PyTorch checkpoint" and loaded.weights.keys() == load_checkpoint(str(source)).weights.keys()
    )
    torch.save({}, source / FILE)
    assert load_checkpoint(str(source)).directory == source


class Harmful:
    """Unpickled without care, it would make a directory."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self._path),)


def code(path: Path) -> None:
    torch.save({"model.embed_tokens.weight": Harmful(path.parent / "harm")}, path)


def no_names(path: Path) -> None:
    torch.save([torch.ones(3)], path)


def nested(path: Path) -> None:
    torch.save({"state_dict": {"a": torch.ones(3)}}, path)


def renamed(path: Path) -> None:
    state = torch.load(path, weights_only=True)
    state["model.layers.1.self_attn.query.weight"] = state.pop("model.layers.1.self_attn.q_proj.weight")
    torch.save(state, path)


def integers(path: Path) -> None:
    state = torch.load(path, weights_only=True)
    state["model.norm.weight"] = state["model.norm.weight"].to(torch.int8)
    torch.save(state, path)


def reshaped(path: Path) -> None:
    state = torch.load(path, weights_only=True)
    state["model.norm.weight"] = state["model.norm.weight"][:5]
    torch.save(state, path)


@pytest.mark.parametrize(
    ("damage", "cause"),
    [
        (code, "the pickle holds code or objects other than tensors and was not loaded"),
        (no_names, "expected tensors by name, as save_pretrained writes them, got list"),
        (nested, "expected tensors by name"),
        (renamed, "layers.1.self_attn.q_proj.weight; unknown ones instead: model.layers.1.self_attn.query.weight"),
        (integers, "model.norm.weight: expected dtype float16, bfloat16, float32, got int8"),
        (reshaped, "model.norm.weight: expected shape [64] from config.json, got [5]"),
        (lambda path: path.write_bytes(path.read_bytes()[:3000]), "not a file of torch.save, or damaged"),
        (lambda path: path.write_bytes(b"not a pickle"), "not a file of torch.save, or damaged"),
        (lambda path: path.write_bytes(b""), "not a file of torch.save, or damaged"),
        (lambda path: path.write_bytes(b"version https://git-lfs"), "a Git LFS pointer"),
    ],
)
def test_refusals(tmp_path: Path, damage: Callable[[Path], Any], cause: str) -> None:
    directory = to_pickles(make_checkpoint(tmp_path / "hf"), tmp_path / "bin")
    damage(directory / FILE)
    with pytest.raises(UserError) as error:
        load_checkpoint(str(directory), work_dir=tmp_path / "work")
    assert cause in error.value.cause and "\n" not in error.value.cause and error.value.remedy
    assert not (directory / "harm").exists()


def test_a_shard_that_is_missing(tmp_path: Path) -> None:
    directory = to_pickles(make_checkpoint(tmp_path / "hf"), tmp_path / "bin", shards=2)
    (directory / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(UserError, match=r"00002-of-00002.bin: missing, pytorch_model.bin.index.json names it"):
        load_checkpoint(str(directory), work_dir=tmp_path / "work")
