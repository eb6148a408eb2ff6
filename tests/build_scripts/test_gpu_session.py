"""The script that runs what waits for a GPU: what it says before it starts."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "build_scripts" / "gpu_session.sh"
TOOLS = "/usr/bin:/bin"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--steps", "tests,speed"], "--steps: unknown step speed"),
        (["--built", "."], "--built: no libminicache_cuda.so in ."),
        (["--output"], "--output: expected a value"),
        (["--fast"], "unknown option --fast"),
        pytest.param(
            ["--steps", "tests,profile"],
            "step profile: ncu is missing",
            marks=pytest.mark.skipif(shutil.which("ncu", path=TOOLS) is not None, reason="ncu is there"),
        ),
        pytest.param([], "finds no GPU", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")),
    ],
)
def test_what_is_wrong_is_said(tmp_path: Path, options: list[str], message: str) -> None:
    environment = {"PATH": TOOLS, "PYTHON": sys.executable}
    command = [str(SCRIPT), *options]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 2 and not list(tmp_path.iterdir())
    cause, remedy = result.stderr.splitlines()
    assert cause.startswith("error: ") and message in cause and remedy.startswith("hint: ")
