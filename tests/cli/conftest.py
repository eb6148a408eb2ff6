"""A tiny random Llama with a tokenizer, an engine built from it, and the command in this process."""

from __future__ import annotations

import itertools
import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from minicache_trt.checkpoint import FAMILIES, parse_config, weight_shapes
from minicache_trt.cli import main
from minicache_trt.compression.methods import MethodOptions, make_plan
from minicache_trt.compression.plan import CompressionPlan
from minicache_trt.config import BuildConfig, ModelConfig
from tests.cli.command import Invoke, Result, assert_refused, snapshot

MAX_SEQ_LEN = 192


CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "dtype": "float32",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 320,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 1,
}


def write_checkpoint(directory: Path, shards: int) -> Path:
    """Random weights in one file, or in several with an index."""
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(CONFIG))
    write_tokenizer(directory)
    shapes, rng = weight_shapes(parse_config(CONFIG, path="config.json")), np.random.default_rng(0)
    weights = {
        FAMILIES["llama"].hf_name(name): np.ones(shape, np.float32)
        if name.endswith("norm.weight")
        else 0.1 * rng.standard_normal(shape, np.float32)
        for name, shape in shapes.items()
    }
    if shards == 1:
        save_file(weights, directory / "model.safetensors")
        return directory
    files = [f"model-{i:05}-of-{shards:05}.safetensors" for i in range(1, shards + 1)]
    places = dict(zip(weights, itertools.cycle(files)))
    for file in files:
        save_file({name: weights[name] for name, place in places.items() if place == file}, directory / file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return directory


def write_tokenizer(directory: Path) -> None:
    """A byte-level BPE tokenizer with a few merges."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=CONFIG["vocab_size"],
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the cat sat on the mat and the dog sat on the log. "] * 20, trainer)
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One weight file."""
    return write_checkpoint(tmp_path_factory.mktemp("source") / "checkpoint", shards=1)


@pytest.fixture(scope="session")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Several weight files and an index."""
    return write_checkpoint(tmp_path_factory.mktemp("source") / "sharded", shards=3)


@pytest.fixture(scope="session")
def engine(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """4-bit MiniCache with int8 weights: every kind of file an engine can have. Not to be changed; see `workspace`."""
    from minicache_trt.build import build_engine

    output = tmp_path_factory.mktemp("built") / "engine"
    limits = BuildConfig(max_batch_size=2, max_seq_len=MAX_SEQ_LEN, max_num_tokens=MAX_SEQ_LEN, weights="int8")
    build_engine(
        str(checkpoint), output, lambda config: (make_plan(config, "minicache4", MethodOptions(merge_start=2)), limits)
    )
    return output


@pytest.fixture(scope="session")
def calibration_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two documents."""
    path = tmp_path_factory.mktemp("text") / "calibration.txt"
    path.write_text("the cat sat on the mat. \n\0" + "a dog and a log? " * 200, newline="")
    return path


@pytest.fixture(scope="session")
def smooth_engine(checkpoint: Path, calibration_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An engine with calibrated matrices, for the torch backend. Not to be changed."""
    from minicache_trt.build import build_engine
    from minicache_trt.compression.smoothquant import key_scales, with_scales

    output = tmp_path_factory.mktemp("built") / "engine"
    limits = BuildConfig(2, MAX_SEQ_LEN, MAX_SEQ_LEN, backend="torch")

    def configure(config: ModelConfig) -> tuple[CompressionPlan, BuildConfig]:
        scales = key_scales(checkpoint, config, calibration_text, lambda done, total: None)
        return with_scales(make_plan(config, "smoothquant"), scales), limits

    build_engine(str(checkpoint), output, configure)
    return output


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current directory."""
    directory = tmp_path / "work"
    directory.mkdir()
    monkeypatch.chdir(directory)
    return directory


@pytest.fixture
def own_checkpoint(checkpoint: Path, workspace: Path) -> Path:
    """A copy of the checkpoint to damage."""
    return shutil.copytree(checkpoint, workspace / "checkpoint")


@pytest.fixture
def own_engine(engine: Path, workspace: Path) -> Path:
    """A copy of the engine to damage or replace."""
    return shutil.copytree(engine, workspace / "engine")


@pytest.fixture
def invoke(workspace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Invoke]:
    """The command in this process and in `workspace`."""
    handler = signal.getsignal(signal.SIGTERM)
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)

    def run(*arguments: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["minicache-trt", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capsys.readouterr()
        return Result(int(ended.value.code or 0), out, err)

    yield run
    signal.signal(signal.SIGTERM, handler)


@pytest.fixture
def refused(invoke: Invoke, workspace: Path) -> Callable[..., None]:
    """``refused(arguments, *parts)``: the command refuses, naming ``parts``, and leaves the directory as it was."""

    def run(arguments: list[object], *parts: str) -> None:
        before = snapshot(workspace)
        assert_refused(invoke(*arguments), *parts)
        assert snapshot(workspace) == before

    return run


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """``small_disk(options)`` mounts a file system in memory; skips where that is not allowed."""
    mounted = []

    def mount(options: str) -> Path:
        directory = tmp_path / f"disk{len(mounted)}"
        directory.mkdir()
        try:
            done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", directory], capture_output=True)
        except FileNotFoundError:
            pytest.skip("no mount command")
        if done.returncode:
            pytest.skip("needs the right to mount a file system")
        mounted.append(directory)
        return directory

    yield mount
    for directory in mounted:
        subprocess.run(["umount", "--lazy", directory], check=True)
