"""Checkpoints of other formats on the command line, with the option names of the tools they come from."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.cli.command import Invoke
from tests.cli.conftest import write_tokenizer
from tests.support.checkpoints import make_checkpoint
from tests.support.trtllm import write_trtllm

Refused = Callable[..., None]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(directory)
    return directory


@pytest.fixture(scope="module")
def trtllm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of two ranks, without a tokenizer as they all are."""
    torch.set_num_threads(1)
    directory = tmp_path_factory.mktemp("trtllm")
    source = make_checkpoint(directory / "hf", vocab_size=320, max_position_embeddings=512)
    return write_trtllm(source, directory / "checkpoint", tp=2)


def test_build_and_run(invoke: Invoke, trtllm: Path, tokenizer: Path) -> None:
    limits = ["--max_batch_size", 2, "--max_seq_len", 128, "--max_num_tokens", 128, "--tp_size", 1]
    places = ["--checkpoint_dir", trtllm, "--output_dir", "engine", "--tokenizer", tokenizer]
    built = invoke("build", *places, *limits, "--json")
    assert built.code == 0, built
    summary = json.loads(built.out)
    assert (summary["family"], summary["max_seq_len"]) == ("llama", 128)
    source = json.loads(Path("engine/config.json").read_text())["source"]
    assert (source["format"], source["directory"]) == ("TensorRT-LLM checkpoint", str(trtllm))
    config = json.loads(Path("engine/checkpoint/config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (0, 1)
    run = invoke("run", "--engine_dir", "engine", "--input_text", "the cat", "--max_output_len", 4, "--threads", 1)
    assert run.code == 0 and run.out.startswith("the cat"), run
    compared = invoke("compare", "-e", "engine", "-p", "the cat sat", "--max-tokens", 4, "--threads", 1, "--json")
    assert compared.code == 0 and json.loads(compared.out)["reference"]["max_abs_diff"] < 1e-3
    assert not list(Path().glob(".minicache-trt-build.*"))


def test_tokenizer_beside_the_ranks(invoke: Invoke, trtllm: Path, tokenizer: Path, workspace: Path) -> None:
    copy = shutil.copytree(trtllm, workspace / "copy")
    for path in tokenizer.iterdir():
        shutil.copyfile(path, copy / path.name)
    built = invoke("build", "-m", copy, "-o", "engine", "--max-seq-len", 128)
    assert built.code == 0, built
    config = json.loads(Path("engine/checkpoint/config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (0, 1)
    assert Path("engine/checkpoint/tokenizer.json").is_file()


def test_tokenizer_at_run(invoke: Invoke, trtllm: Path, tokenizer: Path) -> None:
    assert invoke("build", "-m", trtllm, "-o", "engine", "--max-seq-len", 128).code == 0
    words = ["run", "-e", "engine", "-p", "the cat", "--max-tokens", 2, "--threads", 1]
    without = invoke(*words)
    assert without.code == 2 and "has no tokenizer" in without.err and "--tokenizer DIR" in without.err
    assert invoke(*words, "--tokenizer", tokenizer).code == 0


def test_tokenizer_of_another_directory_for_a_hugging_face_checkpoint(
    invoke: Invoke, own_checkpoint: Path, tokenizer: Path, workspace: Path
) -> None:
    other = shutil.copytree(tokenizer, workspace / "tokenizer")
    (other / "chat_template.jinja").write_text("{{ messages[0].content }}")
    built = invoke("build", "-m", own_checkpoint, "-o", "engine", "--max-seq-len", 128, "--tokenizer", other)
    assert built.code == 0
    assert Path("engine/checkpoint/chat_template.jinja").read_text() == "{{ messages[0].content }}"


def test_plan(invoke: Invoke, trtllm: Path) -> None:
    planned = invoke("plan", "--model_dir", trtllm, "--json")
    assert planned.code == 0 and len(json.loads(planned.out)["layers"]) == 8


def test_names_of_vllm(invoke: Invoke, checkpoint: Path) -> None:
    flags = ["--max-model-len", 100, "--max-num-seqs", 3, "--max-num-batched-tokens", 50]
    built = invoke("build", "-m", checkpoint, "-o", "engine", *flags, "--tensor-parallel-size", 1)
    assert built.code == 0
    limits = json.loads(Path("engine/config.json").read_text())["build"]
    assert (limits["max_seq_len"], limits["max_batch_size"], limits["max_num_tokens"]) == (100, 3, 50)


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--pp-size", "4"], ["--pp-size 4"]),
        (["--tokenizer", "nowhere"], ["--tokenizer: nowhere holds no tokenizer"]),
        (["--load-format", "dummy", "--lora-dir", "x"], ["a dummy has no weights to merge an adapter into"]),
        (["--lora-dir", "nowhere"], ["--lora-dir: nowhere: no adapter_config.json"]),
    ],
)
def test_refusals(refused: Refused, trtllm: Path, flags: list[str], parts: list[str]) -> None:
    refused(["build", "-m", trtllm, "-o", "new/engine", *flags], *parts)


def test_a_rank_that_is_missing(refused: Refused, trtllm: Path, workspace: Path) -> None:
    copy = shutil.copytree(trtllm, workspace / "copy")
    (copy / "rank1.safetensors").unlink()
    refused(["build", "-m", copy, "-o", "new/engine"], "rank1.safetensors missing", "all ranks")


def test_a_rank_that_is_truncated(refused: Refused, trtllm: Path, workspace: Path) -> None:
    copy = shutil.copytree(trtllm, workspace / "copy")
    path = copy / "rank1.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    refused(["build", "-m", copy, "-o", "new/engine"], "rank1.safetensors", "truncated")
