"""The build scripts of the paper's models, with dummy weights."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "build_scripts" / "models"
SCRIPTS = {
    "llama2-7b": ("llama", 32),
    "llama2-13b": ("llama", 40),
    "llama3-8b": ("llama", 32),
    "llama3-70b": ("llama", 80),
    "phi3-mini": ("phi3", 32),
    "mistral-7b": ("mistral", 32),
    "mixtral-8x7b": ("mixtral", 32),
}
QUICK = ("phi3-mini",)


def run_script(name: str, directory: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A script in an empty directory, with this interpreter's command first on PATH."""
    commands = directory / "bin"
    commands.mkdir(exist_ok=True)
    command = commands / "minicache-trt"
    command.write_text(f"#!/bin/sh\nexec {sys.executable} -c 'from minicache_trt.cli import main; main()' \"$@\"\n")
    command.chmod(0o755)
    environment = {**os.environ, "PATH": f"{commands}:{os.environ['PATH']}"}
    script = str(FOLDER / f"{name}.sh")
    return subprocess.run(
        [script, *arguments], cwd=directory, env=environment, capture_output=True, text=True, timeout=300
    )


def test_every_script_is_tried() -> None:
    assert {path.stem for path in FOLDER.glob("*.sh")} == SCRIPTS.keys() | {"common"}


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.long) for name in SCRIPTS]
)
def test_dummy_build(tmp_path: Path, name: str) -> None:
    family, layers = SCRIPTS[name]
    result = run_script(name, tmp_path, "--load-format", "dummy", "--output", "engine", "--json")
    assert result.returncode == 0, result.stderr
    summary = json.loads(result.stdout)
    assert (summary["family"], summary["layers"], summary["method"]) == (family, layers, "minicache4")
    streams = json.loads((tmp_path / "engine" / "config.json").read_text())["plan"]["streams"]
    merged = sorted({layer for stream in streams if len(stream["layers"]) > 1 for layer in stream["layers"]})
    assert merged == list(range(layers // 2, layers))


def test_options_override_the_defaults(tmp_path: Path) -> None:
    flags = ["--load-format", "dummy", "--method", "kivi4", "--max_seq_len", "512", "--backend", "torch", "--json"]
    result = run_script("phi3-mini", tmp_path, *flags)
    assert result.returncode == 0, result.stderr
    summary = json.loads(result.stdout)
    assert (summary["method"], summary["max_seq_len"], summary["backend"]) == ("kivi4", 512, "torch")
    assert (tmp_path / "engines" / "phi3-mini-4k-instruct" / "config.json").is_file()


def test_help(tmp_path: Path) -> None:
    result = run_script("llama3-70b", tmp_path, "--help")
    assert result.returncode == 0 and "from 40 on" in result.stdout
