"""The build script: what it says when something is missing, and that the CUDA library compiles."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.support.plugin_build import NVCC, ROOT, SCRIPT


def build(*arguments: str | Path, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run the script; ``path``: the only folder it finds programs in."""
    environment = {name: value for name, value in os.environ.items() if name not in ("CUDACXX", "CXX", "CUDA_HOME")}
    if path is not None:
        environment |= {"PATH": str(path), "CUDA_HOME": str(path)}
    bash = shutil.which("bash") or "bash"
    return subprocess.run([bash, SCRIPT, *arguments], capture_output=True, text=True, check=False, env=environment)


@pytest.mark.parametrize(
    ("arguments", "cause"),
    [
        (["--fast"], "unknown option --fast"),
        (["--arch", "hopper"], "--arch: expected numbers such as 80,90a, got hopper"),
        (["--jobs", "0"], "--jobs: expected a positive number, got 0"),
        (["--output"], "--output: expected a value"),
        (["--host", "--cuda"], "--host and --cuda exclude each other"),
        (["--cuda", "--emulated"], "--cuda and --emulated exclude each other"),
    ],
)
def test_bad_options_are_refused(arguments: list[str], cause: str) -> None:
    result = build(*arguments)
    assert result.returncode == 2
    error, hint = result.stderr.splitlines()
    assert error == f"error: {cause}" and hint.startswith("hint: ")


@pytest.mark.parametrize("missing", ["cmake", "g++", "nvcc"])
def test_missing_tools_are_named(tmp_path: Path, missing: str) -> None:
    for name in {"bash", "dirname", "nproc", "cmake", "g++", "nvcc"} - {missing}:
        program = tmp_path / name
        program.symlink_to(shutil.which(name) or "/bin/true")
    result = build("--output", tmp_path / "out", path=tmp_path)
    assert result.returncode == 2
    error, hint = result.stderr.splitlines()
    assert error == f"error: {missing} is missing" and hint.startswith("hint: ")
    assert not (tmp_path / "out").exists()


def test_help_lists_every_option() -> None:
    result = build("--help")
    assert result.returncode == 0
    for option in (
        "--host",
        "--cuda",
        "--emulated",
        "--tensorrt",
        "--include",
        "--arch",
        "--reduced",
        "--output",
        "--jobs",
    ):
        assert option in result.stdout


@pytest.mark.skipif(NVCC is None, reason="needs nvcc: install the CUDA toolkit (12.8 or later) and put it on PATH")
def test_cuda_library_compiles_without_warnings_and_spills() -> None:
    """For one architecture, few instantiations; `make check-all` compiles the rest."""
    result = build("--cuda", "--reduced", "--jobs", "2", "--output", ROOT / "build" / "plugins-check")
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.long
@pytest.mark.skipif(NVCC is None, reason="needs nvcc: install the CUDA toolkit (12.8 or later) and put it on PATH")
def test_cuda_library_compiles_for_every_architecture() -> None:
    result = build("--cuda", "--output", ROOT / "build" / "plugins")
    assert result.returncode == 0, result.stdout + result.stderr
