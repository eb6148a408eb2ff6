"""Tensors by name: written short for people, and what is said of those that are wrong, all of them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from minicache_trt.checkpoint import load_checkpoint
from minicache_trt.checkpoint.names import collapsed
from minicache_trt.errors import UserError
from tests.support.checkpoints import make_checkpoint


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["model.norm.weight"], ["model.norm.weight"]),
        ([f"model.layers.{i}.q.weight" for i in (2, 0, 1)], ["model.layers.[0-2].q.weight"]),
        ([f"a.{i}.b" for i in (0, 1, 3, 5, 6)], ["a.[0-1,3,5-6].b"]),
        (["a.7.b", "c", "a.7.d"], ["a.7.b", "c", "a.7.d"]),
        ([f"l.{i}.e.{e}.w" for i in range(2) for e in (0, 3)], ["l.[0-1].e.[0,3].w"]),
        (["l.0.e.0.w", "l.1.e.1.w"], ["l.0.e.0.w", "l.1.e.1.w"]),
        (["w1.weight", "w2.weight"], ["w1.weight", "w2.weight"]),
    ],
)
def test_collapsed(names: list[str], expected: list[str]) -> None:
    assert collapsed(names) == expected


def change(source: Path, edit: object) -> None:
    tensors = load_file(source / "model.safetensors")
    edit(tensors)  # type: ignore[operator]
    save_file(tensors, source / "model.safetensors", {"format": "pt"})


def refusal(source: Path) -> UserError:
    with pytest.raises(UserError) as caught:
        load_checkpoint(str(source))
    return caught.value


def test_renamed_weights(tmp_path: Path) -> None:
    """All of them, each with what it seems to have been before."""
    source = make_checkpoint(tmp_path / "hf")

    def rename(tensors: dict[str, torch.Tensor]) -> None:
        for layer in range(4):
            tensors[f"model.layers.{layer}.attention.wq.weight"] = tensors.pop(
                f"model.layers.{layer}.self_attn.q_proj.weight"
            )
        tensors["model.final_norm.weight"] = tensors.pop("model.norm.weight")

    change(source, rename)
    error = refusal(source)
    assert "5 of 39 weights are missing: model.layers.[0-3].self_attn.q_proj.weight, model.norm.weight;" in error.cause
    assert "unknown ones instead: " in error.cause and "\n" not in error.cause
    old, new = "model.layers.[0-3].attention.wq.weight", "model.layers.[0-3].self_attn.q_proj.weight"
    assert f"undo it: {old} to {new}, model.final_norm.weight to model.norm.weight" in error.remedy


def test_wrong_shapes_and_types(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "hf")

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        for layer in (0, 2, 3):
            tensors[f"model.layers.{layer}.mlp.up_proj.weight"] = torch.zeros(8, 64)
        tensors["model.norm.weight"] = torch.zeros(64, dtype=torch.int8)
        tensors["model.layers.1.self_attn.k_proj.weight"] = torch.zeros(64, 64, dtype=torch.float8_e4m3fn)

    change(source, edit)
    error = refusal(source)
    for part in (
        "model.layers.[0,2-3].mlp.up_proj.weight: expected shape [96, 64] from config.json, got [8, 64]",
        "model.norm.weight: expected dtype float16, bfloat16, float32, got I8",
        "model.layers.1.self_attn.k_proj.weight: expected dtype float16, bfloat16, float32, got F8_E4M3",
    ):
        assert part in error.cause
    assert error.remedy == "use the checkpoint's unquantized version"


def test_mixed_types_are_told(tmp_path: Path) -> None:
    """They are taken as they are; a note says which are which."""
    source = make_checkpoint(tmp_path / "hf", dtype="bfloat16")

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if "layernorm" in name]:
            tensors[name] = tensors[name].float()
        tensors["model.norm.weight"] = tensors["model.norm.weight"].half()

    change(source, edit)
    (note,) = load_checkpoint(str(source)).notes
    assert note.startswith("the weights are bfloat16 but for float32: model.layers.[0-3].input_layernorm.weight, ")
    assert "float16: model.norm.weight" in note
    assert not load_checkpoint(str(make_checkpoint(tmp_path / "equal"))).notes


def test_all_damaged_shards_are_named(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "hf")
    tensors = load_file(source / "model.safetensors")
    names = sorted(tensors)
    places = {name: f"model-{1 + i % 4}.safetensors" for i, name in enumerate(names)}
    for file in set(places.values()):
        own = {name: tensors[name] for name in names if places[name] == file}
        save_file(own, source / file, {"format": "pt"})
    (source / "model.safetensors").unlink()
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    (source / "model-1.safetensors").unlink()
    data = (source / "model-2.safetensors").read_bytes()
    (source / "model-2.safetensors").write_bytes(data[:-4])
    (source / "model-4.safetensors").write_bytes(b"")
    cause = refusal(source).cause
    assert "model-1.safetensors: missing" in cause and "model-4.safetensors: truncated" in cause
    assert re.search(r"model-2.safetensors: truncated: expected \d+ bytes, got \d+; \S+weight cut off", cause)


def test_index_that_belongs_to_other_shards(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "hf")
    (source / "model.safetensors").rename(source / "model-1.safetensors")
    names = load_file(source / "model-1.safetensors")
    places = {**dict.fromkeys(names, "model-1.safetensors"), "a.0.b": "model-1.safetensors"}
    places["a.1.b"] = "model-1.safetensors"
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    assert "model-1.safetensors: lacks a.[0-1].b" in refusal(source).cause
