"""A build that is killed with SIGKILL, and the same command given again."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from minicache_trt.engine_directory import read_engine
from tests.support.checkpoints import make_checkpoint

BUILD = """
import os, signal, sys
from minicache_trt.calibration import samples
from minicache_trt.compression import calibration_text
from minicache_trt.quantization.partial_file import PartialFile

class Words:
    bos_token_id = eos_token_id = None
    def encode(self, text):
        return [sum(map(ord, word)) % 101 for word in text.split()]

calibration_text.load_tokenizer = lambda directory: Words()
kill_after, write, count = int(sys.argv.pop(1)), PartialFile.write, 0

def counted(self, names, parts):
    global count
    write(self, names, parts)
    count += 1
    print("wrote", file=sys.stderr)
    if count == kill_after:
        os.kill(os.getpid(), signal.SIGKILL)

PartialFile.write = counted
from minicache_trt.cli import main
main()
"""


def build(directory: Path, output: str, *flags: str, kill_after: int = 0) -> int:
    """Groups of tensors that a build wrote; one that is to be killed has to be."""
    command = ["build", "-m", "hf", "-o", output, "--method", "full", "--threads", "1", "--json", *flags]
    process = subprocess.run(
        [sys.executable, "-c", BUILD, str(kill_after), *command], cwd=directory, capture_output=True, text=True
    )
    assert process.returncode == (-signal.SIGKILL if kill_after else 0), process.stderr
    return process.stderr.count("wrote")


LONG = pytest.mark.long


@pytest.mark.parametrize("weights", [pytest.param("int4", marks=LONG), pytest.param("bf16", marks=LONG), "int4_awq"])
def test_resume(tmp_path: Path, weights: str) -> None:
    source = make_checkpoint(tmp_path / "hf", num_hidden_layers=3)
    (tmp_path / "text.txt").write_text("a cat and a dog sat on the mat " * 300)
    flags = ["--weights", weights]
    if weights == "int4_awq":
        flags += ["--calibration-text", "text.txt", "--calibration-samples", "2"]
    groups = build(tmp_path, "whole", *flags)
    partial = tmp_path / ".engine.partial"
    assert build(tmp_path, "engine", *flags, kill_after=2) == 2 and partial.is_dir()
    assert not (tmp_path / "engine").exists()
    if weights == "int4":
        # Another group size uses nothing of it, and leaves its own part when it is killed too.
        assert build(tmp_path, "engine", *flags, "--group-size", "64", kill_after=2) == 2
        assert build(tmp_path, "engine", *flags, kill_after=2) == 2
        # So does a checkpoint whose values are others.
        file = source / "model.safetensors"
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)
        assert build(tmp_path, "engine", *flags, kill_after=2) == 2
        groups = build(tmp_path, "whole", *flags, "--force")
    assert build(tmp_path, "engine", *flags) == groups - 2
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".")) == []
    name = "checkpoint/model.safetensors" if weights == "bf16" else "quantized.safetensors"
    assert (tmp_path / "engine" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    read_engine(tmp_path / "engine")
