"""What a model name resolves to, what travels with a checkpoint, and what the errors say."""

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest

from minicache_trt.checkpoint import WeightView, load_checkpoint, resolve_config
from minicache_trt.checkpoint.fingerprint import PIECE_BYTES, PIECES, WHOLE_BYTES, _samples
from minicache_trt.errors import UserError


def test_local_directory(save_model):
    directory, _ = save_model()
    checkpoint = load_checkpoint(str(directory))
    assert checkpoint.directory == directory
    assert checkpoint.source == str(directory)
    assert checkpoint.revision is None and checkpoint.dummy is False
    assert checkpoint.weight_files() == [directory / "model.safetensors"]
    assert resolve_config(str(directory)) == checkpoint.config


def test_directory_comes_before_a_preset_of_that_name(write_config, tmp_path, monkeypatch):
    write_config().rename(tmp_path / "llama2-7b")
    monkeypatch.chdir(tmp_path)
    assert resolve_config("llama2-7b").hidden_size == 64
    monkeypatch.chdir("/")
    assert resolve_config("llama2-7b").hidden_size == 4096


def test_sidecar_files(save_model):
    directory, _ = save_model()
    names = ["tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "merges.txt",
             "vocab.json", "chat_template.jinja", "added_tokens.json"]  # fmt: skip
    for name in [*names, "README.md", "training_args.bin"]:
        (directory / name).write_text("{}")
    expected = sorted([*names, "generation_config.json"])
    assert [path.name for path in load_checkpoint(str(directory)).sidecar_files()] == expected


def test_checksum(save_model):
    directory, _ = save_model()
    before = load_checkpoint(str(directory)).checksum()
    assert before == load_checkpoint(str(directory)).checksum() and len(before) == 64
    (directory / "README.md").write_text("not part of it")
    assert load_checkpoint(str(directory)).checksum() == before
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "rms_norm_eps": 1e-3}))
    changed = load_checkpoint(str(directory)).checksum()
    assert changed != before
    with (directory / "model.safetensors").open("ab") as file:
        file.write(b"\0")
    assert load_checkpoint(str(directory)).checksum() not in (before, changed)


@pytest.mark.parametrize("shard_size", ["1GB", "50KB"])
def test_checksum_sees_values(save_model, shard_size):
    """Every tensor, small or large, in one file or in shards: other values of the same size are another checkpoint."""
    directory, _ = save_model(shard_size=shard_size)
    checkpoint = load_checkpoint(str(directory))
    assert (len(checkpoint.weight_files()) > 1) == (shard_size != "1GB")
    assert min(view.nbytes for view in checkpoint.weights.values()) <= WHOLE_BYTES
    assert max(view.nbytes for view in checkpoint.weights.values()) > 4 * WHOLE_BYTES
    before = checkpoint.checksum()
    for name, view in checkpoint.weights.items():
        size = view.file.stat().st_size
        with view.file.open("r+b") as file:
            file.seek(view.offset)
            own = np.fromfile(file, np.float32, view.nbytes // 4)
            file.seek(view.offset)
            (own * np.float32(1 + 2**-20)).tofile(file)
        assert view.file.stat().st_size == size
        assert checkpoint.checksum() != before, name
        with view.file.open("r+b") as file:
            file.seek(view.offset)
            own.tofile(file)
        assert checkpoint.checksum() == before, name


def test_checksum_reads_little(save_model):
    """A large tensor is sampled from its first to its last byte, by a number of bytes that does not depend on it."""
    view = WeightView("w", Path("f"), 100, 10**10, (10**10 // 2,), "float16")
    samples = _samples(view)
    assert sum(size for _, size in samples) == PIECES * PIECE_BYTES and samples[0][0] == 100
    assert sum(samples[-1]) == 100 + 10**10


def test_checksum_of_a_file_that_is_gone(save_model):
    directory, _ = save_model()
    checkpoint = load_checkpoint(str(directory))
    (directory / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"model\.safetensors: cannot be read \(No such file"):
        checkpoint.checksum()


@pytest.mark.parametrize(
    ("model", "cause", "remedy"),
    [
        ("./nowhere", "./nowhere: no such directory", "check the path"),
        ("/nowhere/at/all", "no such directory", "check the path"),
        ("~/nowhere/at/all", "no such directory", "check the path"),
        ("C:\\models\\x", "no such directory", "check the path"),
        ("llama2-7", "is not a directory, a preset or a hub id", "did you mean llama2-7b[?] presets: .*mistral-7b"),
        ("Mistral7B", "is not a directory", "did you mean mistral-7b[?]"),
        ("zzzzzz", "is not a directory", "^presets: gemma2-27b, "),
        ("", "'' is not a directory", "presets"),
        ("x" * 5000, "cannot be looked up", "check the path"),
        ("~nobody-of-that-name/x", "cannot be looked up", "check the path"),
    ],
)
def test_unknown_model(model, cause, remedy):
    with pytest.raises(UserError, match=cause) as caught:
        load_checkpoint(model)
    with pytest.raises(UserError):
        resolve_config(model)
    assert re.search(remedy, caught.value.remedy)


def test_file_instead_of_directory(save_model):
    directory, _ = save_model()
    with pytest.raises(UserError, match="a file, expected a directory") as caught:
        load_checkpoint(str(directory / "model.safetensors"))
    assert str(directory) in caught.value.remedy


def test_revision_of_a_local_directory(write_config):
    with pytest.raises(UserError, match="a local directory has no revision 'main'"):
        load_checkpoint(str(write_config()), revision="main")


def test_load_format():
    with pytest.raises(UserError, match="load_format: expected auto or dummy, got 'fast'"):
        load_checkpoint("llama2-7b", load_format="fast")


def test_no_config(tmp_path):
    with pytest.raises(UserError, match=r"no config\.json") as caught:
        load_checkpoint(str(tmp_path))
    assert "save_pretrained" in caught.value.remedy


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
@pytest.mark.parametrize(
    ("content", "message"),
    [(b"{", "not JSON"), (b"", "not JSON"), (b"[1]", "expected a JSON object, got list"), (b"\xff\xfe", "not JSON")],
)
def test_bad_json(write_config, name, content, message):
    directory = write_config()
    (directory / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        resolve_config(str(directory))
    assert str(directory / name) in caught.value.cause


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read every file")
def test_unreadable_config(write_config):
    directory = write_config()
    (directory / "config.json").chmod(0)
    with pytest.raises(UserError, match="cannot be read"):
        resolve_config(str(directory))
